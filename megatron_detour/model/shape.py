"""The shape of a ModernBERT, read from a Hugging Face config.json of transformers 4 or 5."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from megatron_detour.errors import DetourError, nearest

FULL, SLIDING = "full_attention", "sliding_attention"
# The only supported values; others would change what the model computes.
FIXED = {
    "norm_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "decoder_bias": True,
    "classifier_bias": False,  # of the prediction head's dense layer
    "hidden_activation": "gelu",
    "classifier_activation": "gelu",
    "tie_word_embeddings": True,
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "mlp_dropout": 0.0,
}
TOKEN_IDS = ("pad_token_id", "cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id")
# Further keys accepted in model.config: those of transformers 4, and those without effect here.
OLD_KEYS = ("global_rope_theta", "local_rope_theta", "global_attn_every_n_layers")
INERT_KEYS = (
    *("model_type", "architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "problem_type"),
    *("id2label", "label2id", "return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward"),
    *("is_encoder_decoder", "initializer_cutoff_factor", "classifier_pooling", "classifier_dropout"),
    *("deterministic_flash_attn", "sparse_prediction", "sparse_pred_ignore_index"),
)
READ_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "layer_types"),
    *("local_attention", "norm_eps", "max_position_embeddings", "initializer_range", "rope_parameters"),
)
# The READ_KEYS that Shape.of checks as strictly as transformers does.
CHECKED_KEYS = {*READ_KEYS} - {"norm_eps", "initializer_range", "rope_parameters"}
MAX_SIZE, MAX_LAYERS = 10**7, 1000  # larger values are typos and would exhaust memory


@dataclass(frozen=True)
class Shape:
    vocabulary: int
    hidden: int
    intermediate: int  # width of the gated unit; Wi has twice as many rows
    heads: int
    layer_types: tuple[str, ...]
    global_theta: float
    local_theta: float
    window: int  # keys on each side that a local layer attends to, besides the query's own
    norm_eps: float
    max_positions: int
    initializer_range: float

    @property
    def layers(self) -> int:
        return len(self.layer_types)

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @classmethod
    def of(cls, config: dict[str, Any], origin: str) -> Shape:
        """Read the mapping of a config.json. Raises DetourError for anything but a supported ModernBERT."""
        if config.get("model_type") != "modernbert":
            raise DetourError(f"{origin}: not a ModernBERT but a {config.get('model_type')!r} model")
        for key, value in FIXED.items():
            if config.get(key, value) != value:
                raise DetourError(f"{origin}: {key} is {config[key]!r}; only ModernBERTs with {value!r} are supported")
        read = _Reader(config, origin)
        hidden, heads = read.size("hidden_size"), read.size("num_attention_heads")
        if hidden % heads or (hidden // heads) % 2:
            raise DetourError(f"{origin}: hidden_size {hidden} cannot be split into {heads} heads of even size")
        vocabulary = read.size("vocab_size")
        for key in TOKEN_IDS:
            if isinstance(config.get(key), list):  # eos_token_id may be a list
                continue
            if config.get(key) is not None:
                read.size(key, least=0)
        return cls(
            vocabulary=vocabulary,
            hidden=hidden,
            intermediate=read.size("intermediate_size"),
            heads=heads,
            layer_types=_layer_types(read, read.size("num_hidden_layers", most=MAX_LAYERS)),
            global_theta=_theta(read, FULL, "global_rope_theta", 160_000.0),
            local_theta=_theta(read, SLIDING, "local_rope_theta", 10_000.0),
            window=read.size("local_attention", 128, least=2) // 2,
            norm_eps=read.number("norm_eps", 1e-5),
            max_positions=read.size("max_position_embeddings", 8192),
            initializer_range=read.number("initializer_range", 0.02),
        )

    def tensor_parallel_faults(self, size: int) -> list[str]:
        """Return one sentence per reason why the model cannot be split over `size` tensor-parallel ranks."""
        fitting = [n for n in range(1, self.heads + 1) if self.heads % n == 0 == self.intermediate % n]
        faults = [
            f"parallel.tensor: {size} does not divide the model's {what}, {count}; possible: "
            f"{', '.join(map(str, fitting))}"
            for what, count in (("attention heads", self.heads), ("intermediate size", self.intermediate))
            if count % size
        ]
        if self.vocabulary < size**2:  # otherwise the last rank may have only padding rows
            faults.append(f"parallel.tensor: {size} is too large for a vocabulary of {self.vocabulary}; set 1")
        return faults


def refuse_unknown_keys(given: dict[str, Any]) -> None:
    """Raise DetourError for a key of model.config that ModernBertConfig does not have."""
    known = [*READ_KEYS, *FIXED, *TOKEN_IDS, *OLD_KEYS, *INERT_KEYS]
    for key in given:
        if key not in known:
            hint = nearest(str(key), known)
            raise DetourError(f"model.config.{key}: transformers' ModernBertConfig has no such key{hint}")


@dataclass(frozen=True)
class _Reader:
    """Typed access to a config.json. Raises DetourError for a missing key or an invalid value."""

    config: dict[str, Any]
    origin: str

    def size(self, key: str, default: int | None = None, least: int = 1, most: int = MAX_SIZE) -> int:
        value = self.config.get(key, default)
        if type(value) is not int or not least <= value <= most:
            self.refuse(key, f"an integer from {least} to {most:,}")
        return value

    def number(self, key: str, default: float) -> float:
        return self.positive(key, self.config.get(key, default))

    def positive(self, key: str, value: Any) -> float:
        if type(value) not in (int, float) or not 0 < value < 1e30:
            self.refuse(key, "a number above 0", value)
        return float(value)

    def mapping(self, key: str, inside: dict[str, Any], name: str = "") -> dict[str, Any]:
        """Return the mapping at `key`, {} for null; `name` is the key in messages."""
        value = inside.get(key)
        if value is not None and not isinstance(value, dict):
            self.refuse(name or key, "a mapping", value)
        return value or {}

    def refuse(self, key: str, needed: str, value: Any = None) -> None:
        if value is None and key not in self.config:
            raise DetourError(f"{self.origin}: missing key {key}; it must be {needed}")
        shown = json.dumps(self.config.get(key) if value is None else value, default=str)
        raise DetourError(f"{self.origin}: {key} must be {needed}, not {shown[:60]}")


def _layer_types(read: _Reader, layers: int) -> tuple[str, ...]:
    types = read.config.get("layer_types")
    if types is None:
        every = read.size("global_attn_every_n_layers", 3)
        return tuple(SLIDING if i % every else FULL for i in range(layers))
    if not isinstance(types, list) or len(types) != layers or any(kind not in (FULL, SLIDING) for kind in types):
        raise DetourError(f"{read.origin}: layer_types must name {FULL} or {SLIDING} for each of the {layers} layers")
    return tuple(types)


def _theta(read: _Reader, layer_type: str, old_key: str, default: float) -> float:
    given = read.mapping("rope_parameters", read.config)
    for key in given:
        if key not in (FULL, SLIDING):
            read.refuse(f"rope_parameters.{key}", f"a key of {FULL} or {SLIDING}", given[key])
    parameters = read.mapping(layer_type, given, f"rope_parameters.{layer_type}")
    if parameters.get("rope_type", "default") != "default":
        raise DetourError(f"{read.origin}: rope_type {parameters['rope_type']!r} is not supported, only 'default'")
    if "rope_theta" in parameters:
        return read.positive(f"rope_parameters.{layer_type}.rope_theta", parameters["rope_theta"])
    old = read.config.get(old_key, default)
    if old is None and layer_type == SLIDING:  # transformers 4: a local theta of null means the global one
        return read.number("global_rope_theta", 160_000.0)
    return read.positive(old_key, old)
