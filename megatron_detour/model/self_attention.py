"""Self-attention over tensor ranks. T positions, S of them on this rank, E hidden size, H local heads, D head size."""

from __future__ import annotations

import torch
from torch import nn

from megatron_detour.model.compute import Compute
from megatron_detour.model.families import Family
from megatron_detour.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_detour.parallel.state import ParallelState


class SelfAttention(nn.Module):
    def __init__(self, shape: Family, state: ParallelState, compute: Compute, bias: bool = False) -> None:
        super().__init__()
        self.compute = compute
        self.Wqkv = ColumnParallelLinear(shape.hidden, 3 * shape.hidden, state, parts=3, bias=bias)
        self.Wo = RowParallelLinear(shape.hidden, shape.hidden, state, bias)

    def heads(self, qkv: torch.Tensor, rotary) -> tuple[torch.Tensor, ...]:
        """Output of Wqkv [T, 3 H D] -> rotated queries and keys, and values [T, H, D]."""
        return self.compute.kernels.rotate_(qkv, *rotary)

    def output(self, attended_THD: torch.Tensor) -> torch.Tensor:
        """Output of attention [T, H, D] -> change of the residual stream [S, E]."""
        return self.Wo(attended_THD.flatten(1))
