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
        (output,) = column_parallel(x, self)
        return output


def column_parallel(x: torch.Tensor, *layers: ColumnParallelLinear) -> tuple[torch.Tensor, ...]:
    """Apply layers to the same x with one gather and one reduction, as if their weights were one matrix."""
    state, weights, biases = layers[0].state, [layer.weight for layer in layers], [layer.bias for layer in layers]
    if state.tensor_size == 1:
        return tuple(functional.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))
    return _ColumnLinear.apply(state, x, *weights, *biases)


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
    """All inputs times a rank's rows of some weights. Backward, the all-reduce of the input gradient overlaps with the
    computation of the weight gradients; with sequence parallelism only this rank's positions of the input are saved
    for it. The weights are not concatenated, as the copy would be kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx, state: ParallelState, x: torch.Tensor, *parameters: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        half = len(parameters) // 2
        weights, biases = parameters[:half], parameters[half:]
        ctx.save_for_backward(x, *weights)
        ctx.state = state
        full = start_all_gather(x, state).wait() if state.sequence_parallel else x
        return tuple(functional.linear(full, weight, bias) for weight, bias in zip(weights, biases, strict=True))

    @staticmethod
    def backward(ctx, *grads: torch.Tensor):
        (full, *weights), state = ctx.saved_tensors, ctx.state
        # False for frozen weights and for inputs of frozen layers.
        _, needs_input, *needs = ctx.needs_input_grad
        needs_weight, needs_bias = needs[: len(weights)], needs[len(weights) :]
        gathering = start_all_gather(full, state) if any(needs_weight) and state.sequence_parallel else None
        summing = None
        if needs_input:
            start = start_reduce_scatter if state.sequence_parallel else start_all_reduce
            summing = start(_sum_of_products(grads, weights), state)
        if gathering:
            full = gathering.wait()
        grad_weights = [grad.T @ full if needed else None for grad, needed in zip(grads, needs_weight, strict=True)]
        grad_biases = [grad.sum(0) if needed else None for grad, needed in zip(grads, needs_bias, strict=True)]
        return None, summing and summing.wait(), *grad_weights, *grad_biases


def _sum_of_products(grads: tuple[torch.Tensor, ...], weights: list[torch.Tensor]) -> torch.Tensor:
    total = grads[0] @ weights[0]
    for grad, weight in zip(grads[1:], weights[1:], strict=True):
        total.addmm_(grad, weight)  # without another tensor of this size
    return total
