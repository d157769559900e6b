"""Export of a causal phase's checkpoint as transformers' ModernBertDecoderForCausalLM."""

from __future__ import annotations

from typing import Any

import torch

from megatron_detour.model.families.base import SLIDING
from megatron_detour.model.families.modernbert import ModernBert
from megatron_detour.release import portable

# Keys of an encoder's config.json that the decoder does not have.
ENCODER_KEYS = (
    "classifier_pooling",
    "deterministic_flash_attn",
    "repad_logits_with_grad",
    "sparse_pred_ignore_index",
    "sparse_prediction",
)


def decoder_config(config: dict[str, Any], shape: ModernBert, dtype: str) -> dict[str, Any]:
    """Return the config.json. `dtype` is that of the weights, such as "bfloat16".

    In the decoder's local layers a query attends to local_attention / 2 keys, including its own; in training it
    attended to its own and the `window` before it.
    """
    own = portable.encoder_config(config, shape, dtype)
    own = {key: value for key, value in own.items() if key not in ENCODER_KEYS}
    if not has_one_theta(shape):
        own["global_rope_theta"] = None  # transformers 4 then fails instead of using this theta in all layers
    return own | {
        "model_type": "modernbert-decoder",
        "architectures": ["ModernBertDecoderForCausalLM"],
        **({"local_attention": 2 * (shape.window + 1)} if shape.window else {}),
        "use_cache": True,
    }


def has_one_theta(shape: ModernBert) -> bool:
    """Return whether all layers use one rope theta, as in transformers 4's ModernBertDecoder."""
    return shape.global_theta == shape.local_theta or SLIDING not in shape.layer_types


def opens_in(shape: ModernBert) -> str:
    """Return the versions of transformers that open the decoder."""
    return "4.54 and later" if has_one_theta(shape) else "5.0 and later"


def release_warnings(shape: ModernBert) -> list[str]:
    if has_one_theta(shape):
        return []
    return ["transformers 4's decoder has one rope theta, the model two: the folder opens in 5 only"]


def decoder_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename full tensors to the decoder's names: q, k and v separate, the head as lm_head."""
    renamed = {}
    for name, weight in weights.items():
        if ".attn.Wqkv." in name:
            for kind, part in zip("qkv", weight.chunk(3), strict=True):
                renamed[name.replace("Wqkv", f"{kind}_proj")] = part
        elif name.startswith("head."):
            renamed[f"lm_{name}"] = weight
        else:
            renamed[name] = weight
    return renamed
