"""Conjugate pairs: what is a copy forward is a sum backward, and the other way (Shoeybi et al., Megatron-LM, 2019)."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_detour.parallel.state import ParallelState


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return sum_over(grad, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        return sum_over(x, group)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return grad, None


def copy_to_tensor_parallel(x: torch.Tensor, state: ParallelState) -> torch.Tensor:
    """Enters the parallel region: `x` is the same on every tensor rank, its gradients are summed."""
    return x if state.tensor_size == 1 else _Copy.apply(x, state.tensor_group)


def reduce_from_tensor_parallel(x: torch.Tensor, state: ParallelState) -> torch.Tensor:
    """Leaves the parallel region: partial sums become their sum on every tensor rank."""
    return x if state.tensor_size == 1 else _Reduce.apply(x, state.tensor_group)


def sum_over(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """A new tensor with the sum of `x` over the group."""
    total = x.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total
