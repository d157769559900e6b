"""The gradients of a step: summed over micro-batches on each rank, then over data-parallel ranks, in fp32."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch

from megatron_detour.parallel.collectives import reduce_scatter_tensor
from megatron_detour.parallel.shard import spec_of
from megatron_detour.parallel.state import ParallelState


class GradientSum:
    """The gradient of a parameter group as one flat fp32 vector, of which each data-parallel rank keeps a part.

    Each parameter's gradient is added to the vector as soon as the backward pass has it, and freed.
    """

    def __init__(
        self, parameters: Iterable[tuple[torch.nn.Parameter, int]], partition: torch.Tensor, parallel: ParallelState
    ) -> None:
        """Take parameters with their offsets in the vector, and the fp32 weights of this rank's part of it."""
        self._group = parallel.data_group
        self._whole = partition.new_zeros(len(partition) * parallel.data_size)
        self.partition = self._whole if parallel.data_size == 1 else torch.empty_like(partition)
        self._counted = []
        for parameter, offset in parameters:
            gradient = self._whole[offset : offset + parameter.numel()].view_as(parameter)
            parameter.register_post_accumulate_grad_hook(partial(_add, gradient))
            # The norm counts what all tensor-parallel ranks hold a copy of once.
            part = part_of(parameter, offset, partition, parallel)
            if part and (parallel.tensor_rank == 0 or spec_of(parameter) is not None):
                self._counted.append(self.partition[part])

    def reduce(self) -> None:
        """Leave in `partition` the sum over data-parallel ranks."""
        if self.partition is not self._whole:
            reduce_scatter_tensor(self.partition, self._whole, group=self._group)

    def sum_of_squares(self) -> torch.Tensor:
        """Return that of this rank's part, a float64 scalar on the device."""
        if not self._counted:
            return self.partition.new_zeros((), dtype=torch.float64)
        return torch.stack(torch._foreach_norm(self._counted, 2.0, torch.float64)).square().sum()

    def clear(self) -> None:
        """Begin the next step at zero."""
        self._whole.zero_()


def part_of(
    parameter: torch.nn.Parameter, offset: int, partition: torch.Tensor, parallel: ParallelState
) -> slice | None:
    """Return where a parameter at `offset` of the flat vector lies in this rank's part of it; None outside."""
    first = offset - len(partition) * parallel.data_rank
    part = slice(max(first, 0), min(first + parameter.numel(), len(partition)))
    return part if part.start < part.stop else None


def _add(gradient: torch.Tensor, parameter: torch.nn.Parameter) -> None:
    gradient.add_(parameter.grad)
    parameter.grad = None
