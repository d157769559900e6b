"""Conjugate pairs of collectives: what one does forward its partner does backward (Shoeybi et al., Megatron-LM, 2019).

| forward | backward | where |
|---|---|---|
| copy | all-reduce | into a column-parallel layer; a whole weight applied to a share of the positions |
| all-reduce | copy | out of a row-parallel layer |
| reduce-scatter | all-gather | out of a row-parallel layer, onto a share of the positions |
| all-gather | slice | from shares of the positions to what every rank computes whole |

The last two serve sequence parallelism (Korthikanti et al., 2022): between the tensor-parallel layers each of the n
tensor ranks keeps T / n of the T positions, so that norms and residuals are neither computed nor kept n times.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_detour.parallel.state import ParallelState

# torch 2.13 renamed both and warns of the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, state: ParallelState) -> torch.Tensor:
        ctx.state = state
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return all_reduce(grad, ctx.state), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, state: ParallelState) -> torch.Tensor:
        return all_reduce(x, state)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return grad, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, state: ParallelState) -> torch.Tensor:
        ctx.state = state
        return start_reduce_scatter(x, state).wait()

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return start_all_gather(grad, ctx.state).wait(), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, state: ParallelState) -> torch.Tensor:
        ctx.state = state
        return start_all_gather(x, state).wait()

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return grad.chunk(ctx.state.tensor_size)[ctx.state.tensor_rank], None


def copy_to_tensor_parallel(x: torch.Tensor, state: ParallelState) -> torch.Tensor:
    """Enters the parallel region: `x` is the same on every tensor rank, its gradients are summed."""
    return x if state.tensor_size == 1 else _Copy.apply(x, state)


def reduce_from_tensor_parallel(x: torch.Tensor, state: ParallelState) -> torch.Tensor:
    """Leaves the parallel region: partial sums [T, ...] become their sum, or a share of it [T / n, ...]."""
    if state.tensor_size == 1:
        return x
    return (_ReduceScatter if state.sequence_parallel else _Reduce).apply(x, state)


def gather_from_sequence_parallel(x: torch.Tensor, state: ParallelState) -> torch.Tensor:
    """Shares [T / n, ...] become [T, ...] for what every rank goes on to compute alike: gradients are whole already."""
    return _Gather.apply(x, state) if state.sequence_parallel else x


def gather_weight(weight: torch.Tensor, state: ParallelState) -> torch.Tensor:
    """A weight that every tensor rank holds whole: where each applies it to a share of the positions, gradients sum."""
    return copy_to_tensor_parallel(weight, state) if state.sequence_parallel else weight


def all_reduce(x: torch.Tensor, state: ParallelState) -> torch.Tensor:
    """A new tensor with the sum of `x` over the tensor ranks."""
    return start_all_reduce(x.contiguous().clone(), state).wait()


class Pending:
    """A collective under way; `wait()` returns its result."""

    def __init__(self, result: torch.Tensor, work: dist.Work) -> None:
        self._result, self._work = result, work

    def wait(self) -> torch.Tensor:
        self._work.wait()
        return self._result


def start_all_reduce(x: torch.Tensor, state: ParallelState) -> Pending:
    """Sums `x` over the tensor ranks, in place."""
    return Pending(x, dist.all_reduce(x, group=state.tensor_group, async_op=True))


def start_reduce_scatter(x: torch.Tensor, state: ParallelState) -> Pending:
    """Sums [T, ...] over the tensor ranks; rank r of n gets the r-th n-th of the positions."""
    if len(x) % state.tensor_size:
        raise ValueError(f"{len(x)} positions do not divide into shares for {state.tensor_size} tensor ranks")
    share = x.new_empty(len(x) // state.tensor_size, *x.shape[1:])
    return Pending(share, _reduce_scatter(share, x.contiguous(), group=state.tensor_group, async_op=True))


def start_all_gather(x: torch.Tensor, state: ParallelState) -> Pending:
    """Joins the ranks' shares [T / n, ...] in rank order."""
    whole = x.new_empty(len(x) * state.tensor_size, *x.shape[1:])
    return Pending(whole, _all_gather(whole, x.contiguous(), group=state.tensor_group, async_op=True))
