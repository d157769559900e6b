"""Normalization. S positions: all, or this tensor rank's part of them under sequence parallelism; E hidden size."""

from __future__ import annotations

import torch
from torch import nn

from megatron_detour.model.compute import Compute
from megatron_detour.model.families import Family
from megatron_detour.parallel.collectives import replicated_weight
from megatron_detour.parallel.state import ParallelState


class LayerNorm(nn.Module):
    """Layer normalization with a weight and no bias; with `state` it may run in the sequence-parallel region."""

    def __init__(self, shape: Family, compute: Compute, state: ParallelState | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape.hidden))
        self.eps, self.kernels, self.state = shape.norm_eps, compute.kernels, state

    def forward(self, x_SE: torch.Tensor) -> torch.Tensor:
        return self.kernels.layer_norm(x_SE, self._weight(), self.eps)

    def add(self, x_SE: torch.Tensor, change_SE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum and its normalization."""
        return self.kernels.add_layer_norm(x_SE, change_SE, self._weight(), self.eps)

    def _weight(self) -> torch.Tensor:
        return self.weight if self.state is None else replicated_weight(self.weight, self.state)
