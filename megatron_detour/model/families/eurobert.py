"""EuroBERT (Boizard et al., 2025): an encoder built like Llama, with an output layer that may be apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_detour.errors import DetourError
from megatron_detour.model.config_json import ConfigJson
from megatron_detour.model.families.base import (
    FULL,
    MAX_LAYERS,
    SIZE_KEYS,
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
    from megatron_detour.model.compute import Compute
    from megatron_detour.model.language_model import LanguageModel
    from megatron_detour.parallel.state import ParallelState

THETA = 10_000.0  # transformers' default; the published models name theirs


@dataclass(frozen=True)
class EuroBert(Family):
    model_type = "eurobert"
    label = "EuroBERT"
    citation = r"""@misc{boizard2025eurobert,
  title = {{EuroBERT}: Scaling Multilingual Encoders for {European} Languages},
  author = {Boizard, Nicolas and Gisserot-Boukhlef, Hippolyte and Alves, Duarte M. and others},
  year = {2025},
  eprint = {2503.05500},
  archivePrefix = {arXiv}
}"""
    defaults: ClassVar = {
        "vocab_size": 128_256,
        "hidden_size": 768,
        "intermediate_size": 3_072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    }
    fixed: ClassVar = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "pretraining_tp": 1}
    checked_keys = frozenset(
        {"model_type", *SIZE_KEYS, "num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings"}
    )
    other_keys = (
        *("rms_norm_eps", "initializer_range", "rope_parameters", "use_cache", "mask_token_id", "classifier_pooling"),
        "attention_dropout",  # fine-tuning's; pretraining drops nothing
    )
    old_keys = ("rope_theta", "rope_scaling")
    part_prefixes: ClassVar = {
        "embeddings": ("model.embed_tokens.",),
        "final_norm": ("model.norm.",),
        "head": ("lm_head.",),
    }
    layer_prefix = "model.layers."
    block_prefixes: ClassVar = {"attention": ("self_attn.",), "mlp": ("mlp.",)}

    split_evenly: ClassVar = Family.split_evenly | {"key and value heads": "key_heads"}
    adjustable = ("max_position_embeddings", "rope_parameters")
    renames = ((r"^(embed_tokens|layers|norm)\.", r"model.\1."),)

    key_heads: int  # of keys and values
    theta: float

    @classmethod
    def adjusted(cls, config: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        changed = super().adjusted(config, given)
        stored, new = (ConfigJson(each, "model.config").mapping("rope_parameters", each) for each in (config, given))
        return changed | {
            "rope_parameters": {**stored, **{key: value for key, value in new.items() if value is not None}}
        }

    @classmethod
    def read_fields(cls, read: ConfigJson) -> dict[str, Any]:
        hidden, heads = read_heads(read, rotary=True)
        if read.config.get("head_dim") not in (None, hidden // heads):
            raise DetourError(f"{read.origin}: head_dim must be hidden_size / num_attention_heads, {hidden // heads}")
        key_heads = heads if read.config.get("num_key_value_heads") is None else read.size("num_key_value_heads")
        if heads % key_heads:
            raise DetourError(f"{read.origin}: num_key_value_heads {key_heads} does not divide {heads} heads")
        return {
            "vocabulary": read.size("vocab_size"),
            "hidden": hidden,
            "intermediate": read.size("intermediate_size"),
            "heads": heads,
            "layer_types": (FULL,) * read.size("num_hidden_layers", most=MAX_LAYERS),
            "window": None,
            "norm_eps": read.number("rms_norm_eps", 1e-5),
            "max_positions": read.size("max_position_embeddings", 8192),
            "initializer_range": read.number("initializer_range", 0.02),
            "key_heads": key_heads,
            "theta": _theta(read),
            "tied": read.flag("tie_word_embeddings", False),
        }

    @classmethod
    def transformers_classes(cls) -> tuple[type, type]:
        try:
            from transformers import EuroBertConfig, EuroBertForMaskedLM
        except ImportError:  # its own code on the hub is never run
            raise DetourError("EuroBERT needs a transformers with EuroBertForMaskedLM; upgrade it") from None

        return EuroBertConfig, EuroBertForMaskedLM

    def build(self, state: ParallelState, compute: Compute | None = None, z_loss: float = 0.0) -> LanguageModel:
        from megatron_detour.model.eurobert import EuroBertModel

        return EuroBertModel(self, state, compute, z_loss)

    def outer_weights(self) -> dict[str, Weight]:
        table = Weight((self.vocabulary, self.hidden), ShardSpec(0, self.vocabulary), self.initializer_range)
        return {
            "model.embed_tokens.weight": table,
            **norm("model.norm", self.hidden),
            **({} if self.tied else {"lm_head.weight": table}),
        }

    def layer_weights(self, number: int) -> dict[str, Weight]:
        E, keys, std = self.hidden, self.key_heads * self.head_dim, self.initializer_range
        return {
            **norm("input_layernorm", E),
            **column("self_attn.q_proj", E, E, std),
            **column("self_attn.k_proj", keys, E, std),
            **column("self_attn.v_proj", keys, E, std),
            **row("self_attn.o_proj", E, E, std),
            **norm("post_attention_layernorm", E),
            **column("mlp.gate_proj", self.intermediate, E, std),
            **column("mlp.up_proj", self.intermediate, E, std),
            **row("mlp.down_proj", E, self.intermediate, std),
        }

    @property
    def head_products(self) -> int:
        return 0  # an output layer alone

    def kept_by_layer(self, recompute: str, fused: bool) -> tuple[int, int]:
        if recompute == "full":
            return self.hidden, 0
        attention = 4 * self.hidden  # q, k and v, repeated for each query head, and the output
        inner = self.intermediate * (2 if recompute == "selective" else 4)  # gate, up, silu(gate) and the product
        return 2 * self.hidden + 2 * self.kept_by_last_norm(fused), attention + inner  # norms and their inputs

    def kept_by_last_norm(self, fused: bool) -> int:
        return self.hidden * (1 if fused else 2)  # on a CPU torch keeps the quotient too

    def at_work_in_layer(self) -> tuple[int, int]:
        return 3 * self.hidden, 3 * self.intermediate

    def kept_by_head(self) -> int:
        return 2 * self.hidden  # chosen rows and their gradient

    @property
    def position_values(self) -> int:
        return self.head_dim  # cos and sin of half a head

    def release_keys(self) -> dict[str, Any]:
        return {
            "tie_word_embeddings": self.tied,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.theta},
            "rope_theta": self.theta,  # read by the code that the hub has for transformers 4
        }

    @property
    def opens_in(self) -> str:
        return "5 with EuroBertForMaskedLM"


def _theta(read: ConfigJson) -> float:
    given = read.mapping("rope_parameters", read.config)
    theta = rope_theta(read, given, "rope_parameters")
    if scaling := read.config.get("rope_scaling"):
        read.refuse("rope_scaling", "null: only unscaled rotary positions are supported", scaling)
    return theta or read.number("rope_theta", THETA)
