"""A FlexBERT training file (github.com/AnswerDotAI/ModernBERT, yamls/) read as the config.json of a ModernBERT."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_detour.errors import DetourError
from megatron_detour.model.config_json import ConfigJson
from megatron_detour.model.families.base import SIZE_KEYS, TOKEN_IDS
from megatron_detour.model.families.modernbert import ModernBert
from megatron_detour.structured import read_yaml

MODERNBERTS = {  # FlexBERT's defaults, where a training file may leave a key out, and what makes it a ModernBERT
    "attention_layer": ("base", "rope"),
    "bert_layer": ("prenorm", "prenorm"),
    "embedding_layer": ("absolute_pos", "sans_pos"),
    "mlp_layer": ("mlp", "glu"),
    "normalization": ("rmsnorm", "layernorm"),
    "embed_norm": (True, True),
    "final_norm": (False, True),
    "skip_first_prenorm": (False, True),
    "head_pred_norm": (True, True),
    "initial_attention_layer": (None, None),
    "initial_bert_layer": (None, None),
    "initial_mlp_layer": (None, None),
    "rotary_emb_dim": (None, None),
    "local_attn_rotary_emb_dim": (None, None),
    "rotary_emb_scale_base": (None, None),
    "rotary_emb_interleaved": (False, False),
}
IMPLEMENTATIONS = ("unpadded_", "padded_", "triton_")  # prefixes of the same function
BIASES = {  # config.json's key: FlexBERT's keys, which must agree, and their default
    "attention_bias": (("attn_qkv_bias", "attn_out_bias"), False),
    "mlp_bias": (("mlp_in_bias", "mlp_out_bias"), False),
    "classifier_bias": (("head_pred_bias",), False),
    "decoder_bias": (("decoder_bias",), True),
}
OFF = -1  # of windows and thetas
ROWS = 8  # FlexBERT rounds the rows of its embedding up to a multiple of this


def read_flexbert(path: Path) -> dict[str, Any]:
    """Return the config.json of a training file's model. Raise DetourError unless it is a ModernBERT."""
    content = read_yaml(path)
    try:
        given, norm = content["model"]["model_config"], content["model"]["model_config"].get("norm_kwargs") or {}
        positions = ConfigJson({"max_seq_len": content.get("max_seq_len", 8192)}, str(path)).size("max_seq_len")
        norm_bias = norm.get("bias", True)
    except (KeyError, TypeError, AttributeError):
        raise DetourError(f"{path}: not a FlexBERT training file: model.model_config must be its model") from None
    read = ConfigJson(given, str(path))
    for key, (default, needed) in MODERNBERTS.items():
        value = given.get(key, default)
        for prefix in IMPLEMENTATIONS:
            value = value.removeprefix(prefix) if isinstance(value, str) else value
        if value != needed:
            raise DetourError(f"{path}: model.model_config.{key} is {value!r}, but only {needed!r} is a ModernBERT's")
    biases = {}
    for key, (names, default) in BIASES.items():
        biases[key], *others = (given.get(name, default) for name in names)
        if any(other != biases[key] for other in others):
            raise DetourError(f"{path}: {' and '.join(names)} differ; a ModernBERT has both or neither")
    window, local_theta = given.get("sliding_window", OFF), _number(read, given, "local_attn_rotary_emb_base", OFF)
    local = {} if window == OFF else {"local_attention": read.size("sliding_window", least=2)}
    every = read.size("global_attn_every_n_layers") if local else 1
    return {
        "model_type": ModernBert.model_type,
        **dict.fromkeys(TOKEN_IDS),  # the tokenizer's: a training file names none
        **{key: read.size(key) for key in SIZE_KEYS},
        "vocab_size": -(-read.size("vocab_size") // ROWS) * ROWS,
        **local,
        "global_attn_every_n_layers": every,
        "global_rope_theta": _number(read, given, "rotary_emb_base", 10_000.0),
        "local_rope_theta": None if local_theta == OFF else local_theta,
        "max_position_embeddings": positions,
        "norm_eps": _number(read, norm, "eps", 1e-5),
        "norm_bias": norm_bias,
        **biases,
        "hidden_activation": given.get("hidden_act", "gelu"),
        "classifier_activation": given.get("head_pred_act", "silu"),
    }


def _number(read: ConfigJson, inside: dict[str, Any], key: str, default: float) -> float:
    """Return a number above 0, or OFF. YAML 1.1 reads 1e-5, without a point, as text."""
    value = inside.get(key, default)
    with suppress(ValueError):
        value = float(value) if isinstance(value, str) else value
    return value if value == OFF == default else read.positive(key, value)
