"""The norms of NVIDIA's apex, where it was built with its extension `fast_layer_norm`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch

from megatron_detour.kernels import plain


def load_norms() -> tuple[Callable, Callable]:
    """Return layer_norm and add_layer_norm, as kernels/plain.py defines them.

    Raises ImportError where apex or its extension is missing; the package that PyPI calls apex is another one.
    """
    fast = import_module("apex.contrib.layer_norm.layer_norm").FastLayerNormFN

    def layer_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        if not len(x):  # what the head gets of a micro-batch without labels
            return plain.layer_norm(x, weight, eps)
        return fast.apply(x, weight, _zeros(weight.shape, weight.dtype, weight.device), eps)

    def add_layer_norm(
        x: torch.Tensor, change: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = x + change
        return x, layer_norm(x, weight, eps)

    return layer_norm, add_layer_norm


@cache
def _zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The bias that the model's norms do not have."""
    return torch.zeros(shape, dtype=dtype, device=device)
