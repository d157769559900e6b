"""Normalization. S positions: all, or this tensor rank's part of them under sequence parallelism; E hidden size."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from megatron_detour.model.compute import Compute
from megatron_detour.model.families import Family
from megatron_detour.parallel.collectives import replicated_weight
from megatron_detour.parallel.state import ParallelState


class LayerNorm(nn.Module):
    """Layer normalization; with `state` it may run in the sequence-parallel region.

    The fused kernels have no bias: with one, torch's own is used.
    """

    def __init__(self, shape: Family, compute: Compute, state: ParallelState | None = None, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape.hidden))
        self.bias = nn.Parameter(torch.empty(shape.hidden)) if bias else None
        self.eps, self.kernels, self.state = shape.norm_eps, compute.kernels, state

    def forward(self, x_SE: torch.Tensor) -> torch.Tensor:
        weight = self._replicated(self.weight)
        if self.bias is None:
            return self.kernels.layer_norm(x_SE, weight, self.eps)
        return functional.layer_norm(x_SE, weight.shape, weight, self._replicated(self.bias), self.eps)

    def add(self, x_SE: torch.Tensor, change_SE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum and its normalization."""
        if self.bias is None:
            return self.kernels.add_layer_norm(x_SE, change_SE, self._replicated(self.weight), self.eps)
        x_SE = x_SE + change_SE
        return x_SE, self(x_SE)

    def _replicated(self, parameter: torch.Tensor) -> torch.Tensor:
        return parameter if self.state is None else replicated_weight(parameter, self.state)


class RMSNorm(nn.Module):
    """Division by the root mean square (Zhang and Sennrich, 2019), for the sequence-parallel region."""

    def __init__(self, shape: Family, state: ParallelState) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape.hidden))
        self.eps, self.state = shape.norm_eps, state

    def forward(self, x_SE: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x_SE, self.weight.shape, replicated_weight(self.weight, self.state), self.eps)
