"""Feed-forward parts over tensor ranks. T positions, S of them on this rank, E hidden size, I local inner width."""

from __future__ import annotations

import torch
from torch import nn

from megatron_detour.model.activations import get_activation
from megatron_detour.model.compute import Compute
from megatron_detour.model.families import Family
from megatron_detour.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_detour.parallel.state import ParallelState


class GatedUnit(nn.Module):
    """Wo(f(a) * b), a and b the halves of Wi and f the activation; with GELU, GeGLU (Shazeer, 2020)."""

    def __init__(
        self, shape: Family, state: ParallelState, compute: Compute, activation: str = "gelu", bias: bool = False
    ) -> None:
        super().__init__()
        self.compute = compute
        self.activation = None if activation == "gelu" else get_activation(activation)  # the kernels know one
        self.Wi = ColumnParallelLinear(shape.hidden, 2 * shape.intermediate, state, parts=2, bias=bias)
        self.Wo = RowParallelLinear(shape.intermediate, shape.hidden, state, bias)

    def forward(self, ab: torch.Tensor) -> torch.Tensor:
        """Output of Wi [T, 2 I] -> change of the residual stream [S, E]."""
        return self.compute.checkpoint("selective", lambda ab: self.Wo(self._product(ab)), ab)

    def _product(self, ab: torch.Tensor) -> torch.Tensor:
        if self.activation is None:
            return self.compute.kernels.geglu(ab)
        a, b = ab.chunk(2, dim=-1)
        return self.activation(a) * b


class FeedForward(nn.Module):
    """Wo(f(a)), a the output of Wi and f the activation (Vaswani et al., 2017)."""

    def __init__(self, shape: Family, state: ParallelState, compute: Compute, activation: str = "gelu") -> None:
        super().__init__()
        self.compute, self.activation = compute, get_activation(activation)
        self.Wi = ColumnParallelLinear(shape.hidden, shape.intermediate, state)
        self.Wo = RowParallelLinear(shape.intermediate, shape.hidden, state)

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        """Output of Wi [T, I] -> change of the residual stream [S, E]."""
        return self.compute.checkpoint("selective", lambda a: self.Wo(self.activation(a)), a)
