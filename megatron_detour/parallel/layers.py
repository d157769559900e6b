"""Megatron's three layers: an embedding cut by vocabulary, linear layers cut by output (column) and by input (row).

T positions, E input features, F output features, n tensor ranks. No layer has a bias, as in ModernBERT.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from megatron_detour.parallel.collectives import copy_to_tensor_parallel, reduce_from_tensor_parallel
from megatron_detour.parallel.shard import ShardSpec, declare
from megatron_detour.parallel.state import ParallelState


class VocabParallelEmbedding(nn.Module):
    """ids [T] -> embeddings [T, E], the same on every rank; a rank holds ceil(vocabulary / n) rows."""

    def __init__(self, vocabulary: int, features: int, state: ParallelState) -> None:
        super().__init__()
        spec = ShardSpec(dim=0, size=vocabulary)
        self.state = state
        self.weight = declare(nn.Parameter(torch.empty(spec.local(state.tensor_size), features)), spec)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.state.tensor_size == 1:
            return functional.embedding(ids, self.weight)
        rows = self.weight.shape[0]
        local = ids - self.state.tensor_rank * rows
        elsewhere = (local < 0) | (local >= rows)
        found = functional.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return reduce_from_tensor_parallel(found.masked_fill(elsewhere[:, None], 0), self.state)


class ColumnParallelLinear(nn.Module):
    """x [T, E], whole on every rank -> [T, F / n]. `parts` fused outputs are cut one by one."""

    def __init__(self, inputs: int, outputs: int, state: ParallelState, parts: int = 1) -> None:
        super().__init__()
        spec = ShardSpec(dim=0, size=outputs, parts=parts)
        self.state = state
        self.weight = declare(nn.Parameter(torch.empty(spec.local(state.tensor_size), inputs)), spec)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(copy_to_tensor_parallel(x, self.state), self.weight)


class RowParallelLinear(nn.Module):
    """x [T, E / n] -> [T, F], whole on every rank."""

    def __init__(self, inputs: int, outputs: int, state: ParallelState) -> None:
        super().__init__()
        spec = ShardSpec(dim=1, size=inputs)
        self.state = state
        self.weight = declare(nn.Parameter(torch.empty(outputs, spec.local(state.tensor_size))), spec)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return reduce_from_tensor_parallel(functional.linear(x, self.weight), self.state)
