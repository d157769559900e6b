"""Weights in torch's pickle files, of which nothing but tensors and plain containers is ever loaded."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch

from megatron_detour.errors import DetourError, brief

COMPOSER = ("state", "model")  # where Composer keeps the weights, as in ModernBERT's own checkpoints


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors by name, mapped from the file. Raise DetourError for a file that needs code, or is damaged."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise DetourError(
            f"{path}: a pickle file that runs code when it is opened, which is refused; save its weights alone, as "
            "model.safetensors, where you trust it"
        ) from None
    except Exception as error:  # of torch's reader, whatever a damaged file makes of it
        raise DetourError(f"{path}: cannot read: {brief(error)}; download or save the model again") from None
    for key in COMPOSER:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise DetourError(f"{path}: it holds no weights by name")
    return {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
