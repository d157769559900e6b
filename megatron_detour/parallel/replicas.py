"""Parameters that every tensor rank holds whole must stay equal on all of them; nothing but this check sees to it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from megatron_detour.parallel.shard import spec_of
from megatron_detour.parallel.state import ParallelState


def unequal_replicas(model: nn.Module, state: ParallelState) -> list[str]:
    """Names of replicated parameters whose bits differ between tensor ranks; every rank must call it."""
    if state.tensor_size == 1:
        return []
    replicated = [(name, p) for name, p in model.named_parameters() if spec_of(p) is None]
    sums = torch.stack([_bit_sum(p) for _, p in replicated])
    lowest, highest = sums.clone(), sums.clone()
    dist.all_reduce(lowest, dist.ReduceOp.MIN, group=state.tensor_group)
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=state.tensor_group)
    return [name for (name, _), differs in zip(replicated, lowest != highest, strict=True) if differs]


def _bit_sum(parameter: torch.Tensor) -> torch.Tensor:
    """A position-weighted sum of the bytes, int64: equal for equal bits, and different for all but contrived others."""
    data = parameter.detach().contiguous().view(torch.uint8).reshape(-1).to(torch.int64)
    weights = torch.arange(len(data), device=data.device) * 2654435761 % 1000003 + 1
    return (data * weights).sum()
