"""The interface of encoder families: everything that the package needs to know of a model, written once per family.

torch and transformers are imported inside functions only: plans are made without them. docs/extending.md shows how to
add a family.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self

from megatron_detour.errors import DetourError, nearest
from megatron_detour.model.config_json import ConfigJson
from megatron_detour.model_parts import SINGLE_PARTS, layers_of
from megatron_detour.parallel.shard_spec import ShardSpec

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_detour.model.compute import Compute
    from megatron_detour.model.language_model import LanguageModel
    from megatron_detour.parallel.state import ParallelState

MAX_LAYERS = 1000  # more is a typo
SIZE_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
FULL, SLIDING = "full_attention", "sliding_attention"
TOKEN_IDS = ("pad_token_id", "cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id")
# Keys that transformers writes for any model, without effect here.
INERT_KEYS = (
    *("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "problem_type", "id2label"),
    *("label2id", "return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward"),
    "is_encoder_decoder",
)


@dataclass(frozen=True)
class Weight:
    """A parameter: its full size, how tensor ranks share it (None: each holds it whole), and its first values.

    These are `fill`, or with a `std` normal, truncated at 2 sigma.
    """

    size: tuple[int, ...]
    shard: ShardSpec | None = None
    std: float = 0.0
    fill: float = 0.0

    @property
    def is_matrix(self) -> bool:
        return len(self.size) > 1

    def elements(self, ranks: int = 1) -> int:
        """The number that one of `ranks` tensor ranks holds, with padding."""
        size = list(self.size)
        if self.shard:
            size[self.shard.dim] = self.shard.local(ranks)
        return math.prod(size)


def column(name: str, outputs: int, inputs: int, std: float, parts: int = 1, bias: bool = False) -> dict[str, Weight]:
    """The parameters of a ColumnParallelLinear with `parts` fused outputs."""
    cut = ShardSpec(0, outputs, parts)
    weights = {f"{name}.weight": Weight((outputs, inputs), cut, std)}
    return weights | ({f"{name}.bias": Weight((outputs,), cut)} if bias else {})


def row(name: str, outputs: int, inputs: int, std: float, bias: bool = False) -> dict[str, Weight]:
    """The parameters of a RowParallelLinear."""
    weights = {f"{name}.weight": Weight((outputs, inputs), ShardSpec(1, inputs), std)}
    return weights | ({f"{name}.bias": Weight((outputs,))} if bias else {})


def norm(name: str, size: int, bias: bool = False) -> dict[str, Weight]:
    """The parameters of a LayerNorm or RMSNorm."""
    weights = {f"{name}.weight": Weight((size,), fill=1.0)}
    return weights | ({f"{name}.bias": Weight((size,))} if bias else {})


def read_heads(read: ConfigJson, rotary: bool) -> tuple[int, int]:
    """Return hidden size and heads; those of `rotary` positions are of even size. Raise DetourError for others."""
    hidden, heads = read.size("hidden_size"), read.size("num_attention_heads")
    if hidden % heads or (rotary and hidden // heads % 2):
        even = " of even size" if rotary else ""
        raise DetourError(f"{read.origin}: hidden_size {hidden} cannot be split into {heads} heads{even}")
    return hidden, heads


def rope_theta(read: ConfigJson, parameters: dict[str, Any], where: str) -> float | None:
    """Return the theta of rotary positions, None if there is none. Raise DetourError for any other parameter."""
    given = {key: value for key, value in parameters.items() if value is not None or key == "rope_theta"}
    for key, value in given.items():
        if key not in ("rope_type", "rope_theta"):
            read.refuse(f"{where}.{key}", "absent: only rope_theta is supported", value)
    if given.get("rope_type", "default") != "default":
        read.refuse(f"{where}.rope_type", "'default'", given["rope_type"])
    return read.positive(f"{where}.rope_theta", given["rope_theta"]) if "rope_theta" in given else None


@dataclass(frozen=True)
class Family(ABC):
    """A family of encoders. What the class says holds for all its models; an instance is the shape of one of them."""

    model_type: ClassVar[str]  # in config.json
    label: ClassVar[str]  # in sentences and on the card
    citation: ClassVar[str]  # BibTeX
    defaults: ClassVar[dict[str, Any]]  # of transformers' configuration class: model.config gives what differs
    published: ClassVar[dict[str, dict[str, Any]]] = {}  # config.json by hub id: plans before a model is fetched
    fixed: ClassVar[dict[str, Any]] = {}  # the only supported values; others would change what the model computes
    checked_keys: ClassVar[frozenset[str]]  # that `read` checks as strictly as transformers does
    other_keys: ClassVar[tuple[str, ...]] = ()  # more keys that model.config may have
    old_keys: ClassVar[tuple[str, ...]] = ()  # that earlier versions of transformers read
    adjustable: ClassVar[tuple[str, ...]] = (
        "max_position_embeddings",
    )  # keys that a start model's run file may change
    part_prefixes: ClassVar[dict[str, tuple[str, ...]]]  # parameter names of embeddings, final_norm and head
    layer_prefix: ClassVar[str]  # of the parameter names of layers; the number follows
    block_prefixes: ClassVar[dict[str, tuple[str, ...]]] = {}  # parameter names in a layer of attention and mlp
    # Regular expressions for names in other forms of a checkpoint, and ours: of an encoder saved without its head, of
    # older versions. "#1" at the end says that a weight is the second part, by rows, of ours.
    renames: ClassVar[tuple[tuple[str, str], ...]] = ()
    has_pooler: ClassVar[bool] = False  # whether transformers' encoder has a layer on [CLS], which is not trained here
    has_decoder: ClassVar[bool] = False  # whether release/decoder.py can write it as a ModernBertDecoder
    # What tensor ranks can only share evenly: its name in sentences, and the field that counts it.
    split_evenly: ClassVar[dict[str, str]] = {"attention heads": "heads", "intermediate size": "intermediate"}
    compiles: ClassVar[bool] = False  # whether model/compiled.py can compile its layers

    vocabulary: int
    hidden: int
    intermediate: int  # inner width of the feed-forward part
    heads: int
    layer_types: tuple[str, ...]  # FULL or SLIDING, the kind of attention of each layer
    window: int | None  # keys on each side that a sliding layer attends to, besides the query's own; None without one
    norm_eps: float
    max_positions: int
    initializer_range: float
    tied: bool = field(default=True, kw_only=True)  # the output layer's weight is the embedding's

    @classmethod
    def read(cls, config: dict[str, Any], origin: str) -> Self:
        """Read the mapping of a config.json. Raise DetourError for an invalid or unsupported value."""
        for key, value in cls.fixed.items():
            if config.get(key, value) != value:
                raise DetourError(f"{origin}: {key} is {config[key]!r}; only {cls.label}s with {value!r} are supported")
        reader = ConfigJson(config, origin)
        for key in TOKEN_IDS:
            if config.get(key) is not None and not isinstance(config[key], list):  # eos_token_id may be a list
                reader.size(key, least=0)
        return cls(**cls.read_fields(reader))

    @classmethod
    def adjusted(cls, config: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """Return a start model's config.json with the keys of `given`. Raise DetourError for one not to be changed."""
        if others := [key for key in given if key not in cls.adjustable]:
            raise DetourError(
                f"model.config: {', '.join(others)}: with model.start only {', '.join(cls.adjustable)} can be changed"
                f"{nearest(others[0], cls.adjustable)}"
            )
        return config | given

    @classmethod
    @abstractmethod
    def read_fields(cls, read: ConfigJson) -> dict[str, Any]:
        """Return the fields of an instance by name."""

    @classmethod
    def own_name(cls, stored: str) -> tuple[str, int]:
        """Return our name of a stored weight, and which part of ours it is."""
        for pattern, own in cls.renames:
            stored = re.sub(pattern, own, stored)
        name, _, part = stored.partition("#")
        return name, int(part or 0)

    @classmethod
    def refuse_unknown_keys(cls, given: dict[str, Any]) -> None:
        """Raise DetourError for a key of a run file's model.config that no model of the family has."""
        known = ["model_type", *cls.checked_keys, *cls.fixed, *TOKEN_IDS, *cls.old_keys, *cls.other_keys, *INERT_KEYS]
        for key in given:
            if key not in known:
                raise DetourError(f"model.config.{key}: {cls.label} has no such key{nearest(str(key), known)}")

    @classmethod
    @abstractmethod
    def transformers_classes(cls) -> tuple[type, type]:
        """Return transformers' classes of the configuration and of the masked language model."""

    @classmethod
    def architecture(cls) -> str:
        """Return the name of transformers' class, as in config.json."""
        return cls.transformers_classes()[1].__name__

    @abstractmethod
    def build(self, state: ParallelState, compute: Compute | None = None, z_loss: float = 0.0) -> LanguageModel:
        """Return the module, with the parameters of `weights` in the same names, their values not yet set."""

    @abstractmethod
    def outer_weights(self) -> dict[str, Weight]:
        """Return the parameters outside the layers, in the names of a transformers checkpoint."""

    @abstractmethod
    def layer_weights(self, number: int) -> dict[str, Weight]:
        """Return the parameters of a layer, in the names that follow its prefix."""

    @abstractmethod
    def kept_by_layer(self, recompute: str, fused: bool) -> tuple[int, int]:
        """Return how many values per position a layer keeps for its backward pass.

        First those between its tensor-parallel linear layers, which only sequence parallelism shares, then those
        inside, which the tensor ranks share. `recompute` as in Compute; `fused`: with Triton's kernels.
        """

    @abstractmethod
    def at_work_in_layer(self) -> tuple[int, int]:
        """Return the same for the gradients that the backward pass of a layer holds at once; the first whole."""

    def kept_by_last_norm(self, fused: bool) -> int:
        """Return how many values per position the norm after the last layer keeps besides its output."""
        return self.hidden

    @abstractmethod
    def kept_by_head(self) -> int:
        """Return the values per labeled position that the head keeps, and the gradient of its last part."""

    @property
    def position_values(self) -> int:
        """The fp32 values per position of tables that all layers share."""
        return 0

    def release_keys(self) -> dict[str, Any]:
        """Return the keys that make every version of transformers that opens the model read its config.json alike."""
        return {}

    @property
    @abstractmethod
    def opens_in(self) -> str:
        """The versions of transformers that open the model."""

    def release_warnings(self) -> list[str]:
        """Return what a user of the released model should know of these versions."""
        return []

    def padding_fault(self, pad: int) -> str | None:
        """Return why a tokenizer with this id of the padding token does not fit the model."""
        return None

    def fitted(self, name: str, weight: Tensor) -> Tensor:
        """Return a start model's parameter, made longer if need be."""
        return weight

    @property
    def tokenizer_outputs(self) -> tuple[str, ...]:
        """What a tokenizer gives the model, by transformers' names."""
        return "input_ids", "attention_mask"

    @property
    def layers(self) -> int:
        return len(self.layer_types)

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @cached_property
    def weights(self) -> dict[str, Weight]:
        """All parameters by name."""
        return self.outer_weights() | {
            f"{self.layer_prefix}{number}.{name}": weight
            for number in range(self.layers)
            for name, weight in self.layer_weights(number).items()
        }

    @property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """The full size of every parameter by name."""
        return {name: weight.size for name, weight in self.weights.items()}

    @property
    def parameters(self) -> int:
        return sum(weight.elements() for weight in self.weights.values())

    @cached_property
    def by_vocabulary(self) -> set[str]:
        """The names of the parameters with a row per id."""
        longer = replace(self, vocabulary=self.vocabulary + 1).sizes
        return {name for name, size in self.sizes.items() if longer[name] != size}

    def names_of(self, parts: tuple[str, ...]) -> set[str]:
        """Return the names of the parameters of the parts that `freeze` names."""
        layers = [f"{self.layer_prefix}{number}." for part in parts for number in layers_of(part)]
        prefixes = (*layers, *(prefix for part in parts for prefix in self.part_prefixes.get(part, ())))
        return {name for name in self.weights if name.startswith(prefixes)}

    def part_fault(self, part: str) -> str:
        """Return why the model lacks a part that `freeze` can name; empty if it has all of it."""
        if layers_of(part).stop > self.layers:
            return f"the model has {self.layers} layers, 0 to {self.layers - 1}"
        if self.names_of((part,)):
            return ""
        own = ", ".join(name for name in SINGLE_PARTS if self.names_of((name,)))
        return f"this {self.label} has no such part; its parts are {own} and layers"

    @cached_property
    def layer_products(self) -> tuple[int, ...]:
        """The multiplications per position with the matrices of each layer."""
        return tuple(_matrix_elements(self.layer_weights(number)) for number in range(self.layers))

    @cached_property
    def head_products(self) -> int:
        """The same per labeled position for the head, without the output layer's matrix, which is the embedding's."""
        head = self.part_prefixes["head"]
        return _matrix_elements({name: weight for name, weight in self.weights.items() if name.startswith(head)})

    def tensor_parallel_faults(self, size: int) -> list[str]:
        """Return one sentence per reason why the model cannot be split over `size` tensor-parallel ranks."""
        counts = {what: getattr(self, name) for what, name in self.split_evenly.items()}
        common = math.gcd(*counts.values())
        fitting = [n for n in range(1, common + 1) if common % n == 0 and (n == 1 or n**2 <= self.vocabulary)]
        faults = [
            f"parallel.tensor: {size} does not divide the model's {what}, {count}; possible: "
            f"{', '.join(map(str, fitting))}"
            for what, count in counts.items()
            if count % size
        ]
        if self.vocabulary < size**2:  # otherwise the last rank may have only padding rows
            faults.append(f"parallel.tensor: {size} is too large for a vocabulary of {self.vocabulary}; set 1")
        return faults


def _matrix_elements(weights: dict[str, Weight]) -> int:
    return sum(weight.elements() for weight in weights.values() if weight.is_matrix)
