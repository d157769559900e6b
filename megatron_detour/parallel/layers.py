"""Megatron's three layers: an embedding sharded by vocabulary, linear layers sharded by output (column) or input (row).

T positions, E input features, F output features, n tensor ranks.
Between the layers there are S positions: T, or T / n with sequence parallelism.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from megatron_detour.parallel.collectives import (
    reduce_from_tensor_parallel,
    replicated_weight,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from megatron_detour.parallel.shard import ShardSpec, mark_sharded
from megatron_detour.parallel.state import ParallelState


class VocabParallelEmbedding(nn.Module):
    """ids [T] -> embeddings [S, E]. W = [W_1; ...; W_n]: rank i holds ceil(vocabulary / n) rows."""

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
        embedded = functional.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return reduce_from_tensor_parallel(embedded.masked_fill(elsewhere[:, None], 0), self.state)


class ColumnParallelLinear(nn.Module):
    """x [S, E] -> [T, F / n]. W = [W_1; ...; W_n]: rank i computes x W_i^T + b_i.

    Each of `parts` fused outputs is split.
    """

    def __init__(self, inputs: int, outputs: int, state: ParallelState, parts: int = 1, bias: bool = False) -> None:
        super().__init__()
        spec = ShardSpec(dim=0, size=outputs, parts=parts)
        rows = spec.local(state.tensor_size)
        self.state = state
        self.weight = mark_sharded(nn.Parameter(torch.empty(rows, inputs)), spec)
        self.bias = mark_sharded(nn.Parameter(torch.empty(rows)), spec) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.state.tensor_size == 1:
            return functional.linear(x, self.weight, self.bias)
        return _ColumnLinear.apply(x, self.weight, self.bias, self.state)


class RowParallelLinear(nn.Module):
    """x [T, E / n] -> [S, F]. W = [W_1, ..., W_n]: rank i computes x_i W_i^T.

    The products are summed, and the bias is added to the sum.
    """

    def __init__(self, inputs: int, outputs: int, state: ParallelState, bias: bool = False) -> None:
        super().__init__()
        spec = ShardSpec(dim=1, size=inputs)
        self.state = state
        self.weight = mark_sharded(nn.Parameter(torch.empty(outputs, spec.local(state.tensor_size))), spec)
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.state.tensor_size == 1:
            return functional.linear(x, self.weight, self.bias)
        summed = reduce_from_tensor_parallel(functional.linear(x, self.weight), self.state)
        return summed if self.bias is None else summed + replicated_weight(self.bias, self.state)


class _ColumnLinear(torch.autograd.Function):
    """All inputs times a rank's rows. Backward, the all-reduce of the input gradient overlaps with the computation of
    the weight gradient; with sequence parallelism only this rank's positions of the input are saved for it.
    """

    @staticmethod
    def forward(
        ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, state: ParallelState
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.state = state
        full = start_all_gather(x, state).wait() if state.sequence_parallel else x
        return functional.linear(full, weight, bias)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        (full, weight), state = ctx.saved_tensors, ctx.state
        # False for frozen weights and for inputs of frozen layers.
        needs_input, needs_weight, needs_bias, _ = ctx.needs_input_grad
        gathering = start_all_gather(full, state) if needs_weight and state.sequence_parallel else None
        summing = None
        if needs_input:
            start = start_reduce_scatter if state.sequence_parallel else start_all_reduce
            summing = start(grad @ weight, state)
        if gathering:
            full = gathering.wait()
        grad_weight = grad.T @ full if needs_weight else None
        grad_bias = grad.sum(0) if needs_bias else None
        return summing and summing.wait(), grad_weight, grad_bias, None
