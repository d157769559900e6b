"""Feed-forward parts over tensor ranks. T positions, S of them on this rank, E hidden size, I local inner width."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from megatron_detour.model.compute import Compute
from megatron_detour.model.families import Family
from megatron_detour.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_detour.parallel.state import ParallelState


class GatedUnit(nn.Module):
    """GeGLU (Shazeer, 2020): Wo(gelu(a) * b), a and b the halves of Wi."""

    def __init__(self, shape: Family, state: ParallelState, compute: Compute) -> None:
        super().__init__()
        self.compute = compute
        self.Wi = ColumnParallelLinear(shape.hidden, 2 * shape.intermediate, state, parts=2)
        self.Wo = RowParallelLinear(shape.intermediate, shape.hidden, state)

    def forward(self, ab: torch.Tensor) -> torch.Tensor:
        """Output of Wi [T, 2 I] -> change of the residual stream [S, E]."""
        return self.compute.checkpoint("selective", lambda ab: self.Wo(self.compute.kernels.geglu(ab)), ab)


class FeedForward(nn.Module):
    """Wo(gelu(a)), a the output of Wi (Vaswani et al., 2017, with GELU)."""

    def __init__(self, shape: Family, state: ParallelState, compute: Compute) -> None:
        super().__init__()
        self.compute = compute
        self.Wi = ColumnParallelLinear(shape.hidden, shape.intermediate, state)
        self.Wo = RowParallelLinear(shape.intermediate, shape.hidden, state)

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        """Output of Wi [T, I] -> change of the residual stream [S, E]."""
        return self.compute.checkpoint("selective", lambda a: self.Wo(functional.gelu(a)), a)
