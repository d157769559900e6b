"""FlashAttention for fine-tuning on a GPU, without padding. B texts padded to T tokens, E hidden size."""

from __future__ import annotations

import importlib
from contextlib import suppress
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available

FLASH = "flash_attention_2"  # transformers' name
UNPADDED = ("modernbert",)  # rotary positions, and a forward pass that takes the starts of texts


def use_best_attention(network: PreTrainedModel) -> None:
    """Switch a model to FlashAttention where the device and the model allow it.

    The encoder of a ModernBERT then computes the tokens of a batch without its padding; that of another model computes
    its attention so. Elsewhere the model keeps transformers' choice, SDPA.
    """
    if name := _flash_here():
        with suppress(ValueError, ImportError):  # a model without it
            network.set_attn_implementation(name)
            if attention_of(network) == name and network.config.model_type in UNPADDED:
                unpad(network.base_model)


def attention_of(network: Any) -> str:
    """Return transformers' name of the attention that a network uses."""
    return network.base_model.config._attn_implementation


def _flash_here() -> str | None:
    """Return FLASH where flash-attn works: on GPUs from Ampere on, which autocast to bf16."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0) or not is_flash_attn_2_available():
        return None
    try:
        importlib.import_module("flash_attn")
    except Exception:  # built for another torch
        return None
    return FLASH


def unpad(encoder: PreTrainedModel) -> None:
    """Make an encoder compute a padded batch [B, T] as one row of its tokens, and return states [B, T, E] again.

    States of padding are zero; no head reads them.
    """
    places: list[tuple[torch.Tensor, torch.Size]] = []  # of the tokens in the flat batch of the call in progress

    def join(_: Any, arguments: tuple, options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        ids, mask = options.pop("input_ids"), options.pop("attention_mask")
        where = mask.flatten().nonzero().squeeze(1)
        lengths = mask.sum(1)
        starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        longest = int(lengths.max())
        places.append((where, ids.shape))
        options |= {"input_ids": ids.flatten()[where][None], "position_ids": where[None] % ids.shape[1]}
        options |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}
        return arguments, options

    def split(_: Any, arguments: tuple, options: dict[str, Any], output: Any) -> Any:
        where, shape = places.pop()
        (states,) = output.last_hidden_state
        padded = states.new_zeros(shape.numel(), states.shape[1]).index_copy(0, where, states)
        output.last_hidden_state = padded.view(*shape, -1)
        return output

    encoder.register_forward_pre_hook(join, with_kwargs=True)
    encoder.register_forward_hook(split, with_kwargs=True)
