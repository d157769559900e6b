"""Values that every tensor rank holds whole must stay equal on all of them; nothing but this check sees to it."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_detour.parallel.state import ParallelState


def unequal_replicas(values: dict[str, torch.Tensor], state: ParallelState) -> list[str]:
    """Names of the values whose bits differ between tensor ranks; every tensor rank must call it."""
    if state.tensor_size == 1 or not values:
        return []
    sums = torch.stack([_bit_sum(value) for value in values.values()])
    lowest, highest = sums.clone(), sums.clone()
    dist.all_reduce(lowest, dist.ReduceOp.MIN, group=state.tensor_group)
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=state.tensor_group)
    return [name for name, differs in zip(values, (lowest != highest).tolist(), strict=True) if differs]


def _bit_sum(value: torch.Tensor) -> torch.Tensor:
    """A position-weighted sum of the bytes, int64: equal for equal bits, and different for all but contrived others."""
    data = value.detach().contiguous().view(torch.uint8).reshape(-1).to(torch.int64)
    weights = torch.arange(len(data), device=data.device) * 2654435761 % 1000003 + 1
    return (data * weights).sum()
