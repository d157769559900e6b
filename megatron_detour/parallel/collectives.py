"""Conjugate pairs of collectives: each is the backward pass of its partner (Shoeybi et al., Megatron-LM, 2019).

| forward | backward | where |
|---|---|---|
| copy | all-reduce | into a column-parallel layer; a replicated weight applied to part of the positions |
| all-reduce | copy | out of a row-parallel layer |
| reduce-scatter | all-gather | out of a row-parallel layer, with sequence parallelism |
| all-gather | slice | out of the sequence-parallel region, into what every rank computes in full |

The last two implement sequence parallelism (Korthikanti et al., 2022): between the tensor-parallel layers each of the n
tensor ranks keeps T / n of the T positions, so that norms and residuals are not computed and stored n times.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_detour.parallel.state import ParallelState

# torch 2.13 renamed both and deprecated the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_tensor = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


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
    """Enter the parallel region: `x` is the same on every tensor rank, its gradients are summed."""
    return x if state.tensor_size == 1 else _Copy.apply(x, state)


def reduce_from_tensor_parallel(x: torch.Tensor, state: ParallelState) -> torch.Tensor:
    """Leave the parallel region: sum partial sums [T, ...]; with sequence parallelism keep this rank's [T / n, ...]."""
    if state.tensor_size == 1:
        return x
    return (_ReduceScatter if state.sequence_parallel else _Reduce).apply(x, state)


def gather_from_sequence_parallel(x: torch.Tensor, state: ParallelState) -> torch.Tensor:
    """Gather [T / n, ...] into [T, ...] for what every rank then computes identically, with complete gradients."""
    return _Gather.apply(x, state) if state.sequence_parallel else x


def own_positions(x: torch.Tensor, state: ParallelState) -> torch.Tensor:
    """Return this rank's positions of what all ranks have: x [T, ...], or [T / n, ...] with sequence parallelism."""
    return x.chunk(state.tensor_size)[state.tensor_rank] if state.sequence_parallel else x


def replicated_weight(weight: torch.Tensor, state: ParallelState) -> torch.Tensor:
    """Use a replicated weight on this rank's positions; with sequence parallelism its gradients have to be summed."""
    return copy_to_tensor_parallel(weight, state) if state.sequence_parallel else weight


def all_reduce(x: torch.Tensor, state: ParallelState) -> torch.Tensor:
    """Return the sum of `x` over the tensor ranks as a new tensor."""
    return start_all_reduce(x.contiguous().clone(), state).wait()


class Pending:
    """A running collective; `wait()` returns its result."""

    def __init__(self, result: torch.Tensor, work: dist.Work) -> None:
        self._result, self._work = result, work

    def wait(self) -> torch.Tensor:
        self._work.wait()
        return self._result


def start_all_reduce(x: torch.Tensor, state: ParallelState) -> Pending:
    """Sum `x` over the tensor ranks, in place."""
    return Pending(x, dist.all_reduce(x, group=state.tensor_group, async_op=True))


def start_reduce_scatter(x: torch.Tensor, state: ParallelState) -> Pending:
    """Sum [T, ...] over the tensor ranks; rank r of n gets the r-th block of T / n positions."""
    if len(x) % state.tensor_size:
        raise ValueError(f"{len(x)} positions are not divisible by {state.tensor_size} tensor ranks")
    local = x.new_empty(len(x) // state.tensor_size, *x.shape[1:])
    return Pending(local, reduce_scatter_tensor(local, x.contiguous(), group=state.tensor_group, async_op=True))


def start_all_gather(x: torch.Tensor, state: ParallelState) -> Pending:
    """Concatenate the ranks' [T / n, ...] in rank order."""
    full = x.new_empty(len(x) * state.tensor_size, *x.shape[1:])
    return Pending(full, _all_gather(full, x.contiguous(), group=state.tensor_group, async_op=True))


def unequal_replicas(values: dict[str, torch.Tensor], state: ParallelState) -> list[str]:
    """Return the names of the values whose bits differ between tensor ranks. Collective over the tensor ranks.

    Replicated parameters must stay equal on all ranks, and nothing else enforces it.
    """
    if state.tensor_size == 1 or not values:
        return []
    sums = torch.stack([_checksum(value) for value in values.values()])
    lowest, highest = sums.clone(), sums.clone()
    dist.all_reduce(lowest, dist.ReduceOp.MIN, group=state.tensor_group)
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=state.tensor_group)
    return [name for name, differs in zip(values, (lowest != highest).tolist(), strict=True) if differs]


def _checksum(value: torch.Tensor) -> torch.Tensor:
    """Return a position-weighted sum of the bytes, int64 []."""
    data = value.detach().contiguous().view(torch.uint8).reshape(-1).to(torch.int64)
    weights = torch.arange(len(data), device=data.device) * 2654435761 % 1000003 + 1
    return (data * weights).sum()
