"""Megatron's three layers: an embedding cut by vocabulary, linear layers cut by output (column) and by input (row).

T positions, E input features, F output features, n tensor ranks. No layer has a bias, as in ModernBERT.
S positions are T, or T / n with sequence parallelism: what lies between the layers.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from megatron_detour.parallel.collectives import (
    reduce_from_tensor_parallel,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from megatron_detour.parallel.shard import ShardSpec, mark_sharded
from megatron_detour.parallel.state import ParallelState


class VocabParallelEmbedding(nn.Module):
    """ids [T] -> embeddings [S, E]; a rank holds ceil(vocabulary / n) rows."""

    def __init__(self, vocabulary: int, features: int, state: ParallelState) -> None:
        super().__init__()
        spec = ShardSpec(dim=0, size=vocabulary)
        self.state = state
        self.weight = mark_sharded(nn.Parameter(torch.empty(spec.local(state.tensor_size), features)), spec)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.state.tensor_size == 1:
            return functional.embedding(ids, self.weight)
        rows = self.weight.shape[0]
        local = ids - self.state.tensor_rank * rows
        elsewhere = (local < 0) | (local >= rows)
        found = functional.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return reduce_from_tensor_parallel(found.masked_fill(elsewhere[:, None], 0), self.state)


class ColumnParallelLinear(nn.Module):
    """x [S, E] -> [T, F / n]. `parts` fused outputs are cut one by one."""

    def __init__(self, inputs: int, outputs: int, state: ParallelState, parts: int = 1) -> None:
        super().__init__()
        spec = ShardSpec(dim=0, size=outputs, parts=parts)
        self.state = state
        self.weight = mark_sharded(nn.Parameter(torch.empty(spec.local(state.tensor_size), inputs)), spec)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.state.tensor_size == 1:
            return functional.linear(x, self.weight)
        return _ColumnLinear.apply(x, self.weight, self.state)


class RowParallelLinear(nn.Module):
    """x [T, E / n] -> [S, F]."""

    def __init__(self, inputs: int, outputs: int, state: ParallelState) -> None:
        super().__init__()
        spec = ShardSpec(dim=1, size=inputs)
        self.state = state
        self.weight = mark_sharded(nn.Parameter(torch.empty(outputs, spec.local(state.tensor_size))), spec)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return reduce_from_tensor_parallel(functional.linear(x, self.weight), self.state)


class _ColumnLinear(torch.autograd.Function):
    """A product of whole inputs with a rank's rows. Backward, the sum of the input's gradients over the ranks travels
    while the weight's is computed; with sequence parallelism only this rank's share of the inputs is kept till then.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, state: ParallelState) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.state = state
        whole = start_all_gather(x, state).wait() if state.sequence_parallel else x
        return functional.linear(whole, weight)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        (whole, weight), state = ctx.saved_tensors, ctx.state
        needs_input, needs_weight, _ = ctx.needs_input_grad  # a frozen weight needs none, nor does what lies below it
        gathering = start_all_gather(whole, state) if needs_weight and state.sequence_parallel else None
        summing = None
        if needs_input:
            start = start_reduce_scatter if state.sequence_parallel else start_all_reduce
            summing = start(grad @ weight, state)
        if gathering:
            whole = gathering.wait()
        grad_weight = grad.T @ whole if needs_weight else None
        return summing and summing.wait(), grad_weight, None
