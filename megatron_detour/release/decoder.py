"""A checkpoint of a causal phase as transformers' ModernBertDecoderForCausalLM."""

from __future__ import annotations

from typing import Any

import torch

from megatron_detour.model.shape import SLIDING, Shape
from megatron_detour.release import portable

# Of an encoder's config.json: what the decoder does not have.
OF_THE_ENCODER = (
    "classifier_pooling",
    "deterministic_flash_attn",
    "repad_logits_with_grad",
    "sparse_pred_ignore_index",
    "sparse_prediction",
)


def decoder_config(config: dict[str, Any], shape: Shape, dtype: str) -> dict[str, Any]:
    """The config.json. `dtype` is that of the weights, as in "bfloat16".

    The decoder's local layers see local_attention / 2 keys, the query's own among them; in training they saw the
    query's own and `window` before it.
    """
    own = portable.encoder_config(config, shape, dtype)
    own = {key: value for key, value in own.items() if key not in OF_THE_ENCODER}
    if not turns_alike(shape):
        own["global_rope_theta"] = None  # transformers 4 then stops, where it would turn all layers by this one
    return own | {
        "model_type": "modernbert-decoder",
        "architectures": ["ModernBertDecoderForCausalLM"],
        "local_attention": 2 * (shape.window + 1),
        "use_cache": True,
    }


def turns_alike(shape: Shape) -> bool:
    """Whether one rope theta serves all layers, as in transformers 4's ModernBertDecoder."""
    return shape.global_theta == shape.local_theta or SLIDING not in shape.layer_types


def first_version(shape: Shape) -> str:
    """Of transformers, that opens the decoder."""
    return "4.54" if turns_alike(shape) else "5.0"


def decoder_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Full tensors under the decoder's names: q, k and v apart, the head as lm_head."""
    found = {}
    for name, weight in weights.items():
        if name.endswith("attn.Wqkv.weight"):
            for kind, part in zip("qkv", weight.chunk(3), strict=True):
                found[name.replace("Wqkv", f"{kind}_proj")] = part
        elif name.startswith("head."):
            found[f"lm_{name}"] = weight
        else:
            found[name] = weight
    return found
