"""ModernBERT (Warner et al., 2024): pre-norm layers, gated units, global and local attention, rotary positions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_detour.errors import DetourError
from megatron_detour.model import activations
from megatron_detour.model.config_json import ConfigJson
from megatron_detour.model.families.base import (
    FULL,
    MAX_LAYERS,
    SIZE_KEYS,
    SLIDING,
    Family,
    Weight,
    column,
    norm,
    read_heads,
    rope_theta,
    row,
)
from megatron_detour.parallel.shard_spec import ShardSpec

if TYPE_CHECKING:
    from torch import nn

    from megatron_detour.model.compute import Compute
    from megatron_detour.model.language_model import LanguageModel
    from megatron_detour.parallel.state import ParallelState

BASE = {  # and transformers' defaults
    "vocab_size": 50_368,
    "hidden_size": 768,
    "intermediate_size": 1_152,
    "num_hidden_layers": 22,
    "num_attention_heads": 12,
}
LARGE = {"hidden_size": 1_024, "intermediate_size": 2_624, "num_hidden_layers": 28, "num_attention_heads": 16}
PUBLISHED = {
    "answerdotai/ModernBERT-base": BASE,
    "answerdotai/ModernBERT-large": BASE | LARGE,
    "almanach/moderncamembert-base": BASE | {"vocab_size": 32_768},
    "almanach/moderncamembert-large": BASE | LARGE | {"vocab_size": 32_768},
    "jhu-clsp/ettin-encoder-150m": BASE,
    "jhu-clsp/mmBERT-base": BASE | {"vocab_size": 256_000, "local_rope_theta": 160_000.0},
}
BIASES = {  # and the published models' values; the classifier's is that of the prediction head's dense layer
    "norm_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "classifier_bias": False,
    "decoder_bias": True,
}


@dataclass(frozen=True)
class ModernBert(Family):
    model_type = "modernbert"
    label = "ModernBERT"
    citation = r"""@misc{warner2024modernbert,
  title = {Smarter, Better, Faster, Longer: A Modern Bidirectional Encoder for Fast, Memory Efficient, and Long Context
           Finetuning and Inference},
  author = {Warner, Benjamin and Chaffin, Antoine and Clavi{\'e}, Benjamin and Weller, Orion and Hallstr{\"o}m, Oskar and
            Taghadouini, Said and Gallagher, Alexis and Biswas, Raja and Ladhak, Faisal and Aarsen, Tom and Cooper, Nathan and
            Adams, Griffin and Howard, Jeremy and Poli, Iacopo},
  year = {2024},
  eprint = {2412.13663},
  archivePrefix = {arXiv}
}"""  # noqa: E501
    defaults = BASE
    published: ClassVar = {name: config | {"model_type": "modernbert"} for name, config in PUBLISHED.items()}
    fixed: ClassVar = {"tie_word_embeddings": True}
    checked_keys = frozenset({"model_type", *SIZE_KEYS, "layer_types", "local_attention", "max_position_embeddings"})
    other_keys = (
        *(*BIASES, "hidden_activation", "classifier_activation"),
        *("attention_dropout", "embedding_dropout", "mlp_dropout"),  # fine-tuning's; pretraining drops nothing
        *("norm_eps", "initializer_range", "rope_parameters", "initializer_cutoff_factor", "classifier_pooling"),
        *("classifier_dropout", "deterministic_flash_attn", "sparse_prediction", "sparse_pred_ignore_index"),
    )
    old_keys = ("global_rope_theta", "local_rope_theta", "global_attn_every_n_layers")
    part_prefixes: ClassVar = {
        "embeddings": ("model.embeddings.",),
        "final_norm": ("model.final_norm.",),
        "head": ("head.", "decoder."),
    }
    layer_prefix = "model.layers."
    block_prefixes: ClassVar = {"attention": ("attn.",), "mlp": ("mlp.",)}
    adjustable = (
        *("max_position_embeddings", "local_attention", "rope_parameters", "global_rope_theta", "local_rope_theta"),
    )
    renames = (
        (r"^(?:model\.)?bert\.encoder\.", "model."),  # FlexBERT, in which ModernBERT was trained
        (r"^(?:model\.)?bert\.", "model."),
        (r"^model\.(head|decoder)\.", r"\1."),
        (r"^(embeddings|layers|final_norm)\.", r"model.\1."),
        (r"^lm_head\.", "head."),  # ModernBertDecoder
        *((rf"\.attn\.{letter}_proj\.(weight|bias)$", rf".attn.Wqkv.\1#{part}") for part, letter in enumerate("qkv")),
    )
    has_decoder = True

    compiles = True

    global_theta: float
    local_theta: float
    norm_bias: bool
    attention_bias: bool
    mlp_bias: bool
    head_bias: bool
    decoder_bias: bool
    activation: str
    head_activation: str

    @classmethod
    def adjusted(cls, config: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """Each theta is changed alone, in the form that the start model's config.json has, or in the other."""
        changed, read = super().adjusted(config, given), ConfigJson(given, "model.config")
        start = ConfigJson(config, "config.json")
        stored, new = (each.mapping("rope_parameters", each.config) for each in (start, read))
        if not stored and not new:
            return changed
        merged = {**stored, **new}
        for kind, old_key in ((FULL, "global_rope_theta"), (SLIDING, "local_rope_theta")):
            theta = {"rope_theta": read.positive(old_key, given[old_key])} if old_key in given else {}
            named = read.mapping(kind, new, f"rope_parameters.{kind}")
            if theta and named:
                raise DetourError(
                    f"model.config: {old_key} and rope_parameters.{kind} are one setting; give one of them"
                )
            merged[kind] = {**start.mapping(kind, stored, f"rope_parameters.{kind}"), **theta, **named}
        return changed | {"rope_parameters": merged}

    @classmethod
    def read_fields(cls, read: ConfigJson) -> dict[str, Any]:
        hidden, heads = read_heads(read, rotary=True)
        layer_types = _layer_types(read, read.size("num_hidden_layers", most=MAX_LAYERS))
        window = read.size("local_attention", 128, least=2) // 2
        return {
            "vocabulary": read.size("vocab_size"),
            "hidden": hidden,
            "intermediate": read.size("intermediate_size"),  # width of the gated unit; Wi has twice as many rows
            "heads": heads,
            "layer_types": layer_types,
            "global_theta": _theta(read, FULL, "global_rope_theta", 160_000.0),
            "local_theta": _theta(read, SLIDING, "local_rope_theta", 10_000.0),
            "window": window if SLIDING in layer_types else None,
            "norm_eps": read.number("norm_eps", 1e-5),
            "max_positions": read.size("max_position_embeddings", 8192),
            "initializer_range": read.number("initializer_range", 0.02),
            "activation": read.choice("hidden_activation", activations.NAMES, "gelu"),
            "head_activation": read.choice("classifier_activation", activations.NAMES, "gelu"),
            **{
                "head_bias" if key == "classifier_bias" else key: read.flag(key, usual) for key, usual in BIASES.items()
            },
        }

    @classmethod
    def transformers_classes(cls) -> tuple[type, type]:
        from transformers import ModernBertConfig, ModernBertForMaskedLM

        return ModernBertConfig, ModernBertForMaskedLM

    def build(self, state: ParallelState, compute: Compute | None = None, z_loss: float = 0.0) -> LanguageModel:
        from megatron_detour.model.modernbert import ModernBertModel

        return ModernBertModel(self, state, compute, z_loss)

    def feed_forward(self, state: ParallelState, compute: Compute) -> nn.Module:
        """Return the feed-forward part of a layer."""
        from megatron_detour.model.mlp import GatedUnit

        return GatedUnit(self, state, compute, self.activation, self.mlp_bias)

    def outer_weights(self) -> dict[str, Weight]:
        by_row, std = ShardSpec(0, self.vocabulary), self.initializer_range
        return {
            "model.embeddings.tok_embeddings.weight": Weight((self.vocabulary, self.hidden), by_row, std),
            **norm("model.embeddings.norm", self.hidden, self.norm_bias),
            **norm("model.final_norm", self.hidden, self.norm_bias),
            "head.dense.weight": Weight((self.hidden, self.hidden), std=std),
            **({"head.dense.bias": Weight((self.hidden,))} if self.head_bias else {}),
            **norm("head.norm", self.hidden, self.norm_bias),
            **({"decoder.bias": Weight((self.vocabulary,), by_row)} if self.decoder_bias else {}),
        }

    def layer_weights(self, number: int) -> dict[str, Weight]:
        E, first, last, bias = self.hidden, self.initializer_range, self.output_std, self.attention_bias
        return {
            # The embedding has normalized the first layer's input.
            **(norm("attn_norm", E, self.norm_bias) if number else {}),
            **column("attn.Wqkv", 3 * E, E, first, parts=3, bias=bias),
            **row("attn.Wo", E, E, last, bias=bias),
            **norm("mlp_norm", E, self.norm_bias),
            **self.feed_forward_weights(),
        }

    def feed_forward_weights(self) -> dict[str, Weight]:
        E, first, last, bias = self.hidden, self.initializer_range, self.output_std, self.mlp_bias
        return {
            **column("mlp.Wi", 2 * self.intermediate, E, first, parts=2, bias=bias),
            **row("mlp.Wo", E, self.intermediate, last, bias=bias),
        }

    @property
    def output_std(self) -> float:
        """Of the first values of projections into the residual stream, to which 2 * layers of them add."""
        return self.initializer_range / math.sqrt(2 * self.layers)

    def kept_by_layer(self, recompute: str, fused: bool) -> tuple[int, int]:
        sums = normalized = 2 * self.hidden
        if recompute == "full":
            return sums, 0
        attention = 4 * self.hidden  # q, k, v and the output
        if recompute == "selective":
            return sums, attention + self.kept_by_feed_forward()[0]
        kept, product, unfused = self.kept_by_feed_forward()
        return sums + normalized, attention + kept + product + (0 if fused else unfused)

    def kept_by_feed_forward(self) -> tuple[int, int, int]:
        """Return the values of Wi's output, of Wo's input, and what the plain kernels keep besides."""
        return 2 * self.intermediate, self.intermediate, self.intermediate  # gelu(a)

    def at_work_in_layer(self) -> tuple[int, int]:
        return 3 * self.hidden, 3 * self.intermediate  # gradients inside the gated unit

    def kept_by_head(self) -> int:
        return 5 * self.hidden  # chosen rows, dense, gelu, norm, and the gradient of the last

    @property
    def position_values(self) -> int:
        return 2 * self.head_dim  # cos and sin of half a head, global and local

    def release_keys(self) -> dict[str, Any]:
        """transformers 4 has global_attn_every_n_layers and two rope thetas where 5 has layer_types and
        rope_parameters: both are written, and each version passes over what it does not know."""
        return {
            **({"local_attention": 2 * self.window} if self.window else {}),
            "tie_word_embeddings": True,
            "layer_types": list(self.layer_types),
            # None where no number says it: transformers 4 then stops, where its default would be another function.
            "global_attn_every_n_layers": self.every_n_layers,
            "rope_parameters": {
                FULL: {"rope_type": "default", "rope_theta": self.global_theta},
                SLIDING: {"rope_type": "default", "rope_theta": self.local_theta},
            },
            "global_rope_theta": self.global_theta,
            "local_rope_theta": self.local_theta,
            # Otherwise 4 compiles parts of the model where it finds triton: minutes at first use, for the same values.
            "reference_compile": False,
        }

    @property
    def every_n_layers(self) -> int | None:
        """The n of transformers 4 with which every n-th layer from the first is global; None where there is none."""
        fitting = (
            n
            for n in range(1, self.layers + 1)
            if all((kind == FULL) == (i % n == 0) for i, kind in enumerate(self.layer_types))
        )
        return next(fitting, None)

    @property
    def opens_in(self) -> str:
        """4.54.0 turns the local layers by the global theta: its own mistake."""
        if self.every_n_layers is None:
            return "5.0 and later"
        return "4.48 and later; not 4.54.0, whose local layers differ"

    def release_warnings(self) -> list[str]:
        if self.every_n_layers is not None:
            return []
        return ["transformers 4 does not support this pattern of global layers: the folder opens in 5 only"]


def _layer_types(read: ConfigJson, layers: int) -> tuple[str, ...]:
    types = read.config.get("layer_types")
    if types is None:
        every = read.size("global_attn_every_n_layers", 3)
        return tuple(SLIDING if i % every else FULL for i in range(layers))
    if not isinstance(types, list) or len(types) != layers or any(kind not in (FULL, SLIDING) for kind in types):
        raise DetourError(f"{read.origin}: layer_types must name {FULL} or {SLIDING} for each of the {layers} layers")
    return tuple(types)


def _theta(read: ConfigJson, layer_type: str, old_key: str, default: float) -> float:
    given = read.mapping("rope_parameters", read.config)
    for key in given:
        if key not in (FULL, SLIDING):
            read.refuse(f"rope_parameters.{key}", f"a key of {FULL} or {SLIDING}", given[key])
    parameters = read.mapping(layer_type, given, f"rope_parameters.{layer_type}")
    theta = rope_theta(read, parameters, f"rope_parameters.{layer_type}")
    if theta is not None:
        return theta
    old = read.config.get(old_key, default)
    if old is None and layer_type == SLIDING:  # transformers 4: a local theta of null means the global one
        return read.number("global_rope_theta", 160_000.0)
    return read.positive(old_key, old)
