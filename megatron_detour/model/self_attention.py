"""Self-attention over tensor ranks. T positions, S of them on this rank, E hidden size, H local heads, D head size."""

from __future__ import annotations

import torch
from torch import nn

from megatron_detour.model.attention import AttentionPattern
from megatron_detour.model.compute import Compute
from megatron_detour.model.families import Family
from megatron_detour.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_detour.parallel.state import ParallelState


class SelfAttention(nn.Module):
    def __init__(self, shape: Family, state: ParallelState, compute: Compute) -> None:
        super().__init__()
        self.compute = compute
        self.Wqkv = ColumnParallelLinear(shape.hidden, 3 * shape.hidden, state, parts=3)
        self.Wo = RowParallelLinear(shape.hidden, shape.hidden, state)

    def forward(self, qkv: torch.Tensor, rotary, pattern: AttentionPattern) -> torch.Tensor:
        """Output of Wqkv [T, 3 H D] -> change of the residual stream [S, E]."""
        q_THD, k_THD, v_THD = self.compute.kernels.rotate_(qkv, *rotary)
        return self.Wo(self.compute.attention(q_THD, k_THD, v_THD, pattern).flatten(1))
