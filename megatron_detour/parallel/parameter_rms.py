"""Root mean squares over whole parameters, of which each rank holds a part, or none."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist

from megatron_detour.parallel.gradients import part_of
from megatron_detour.parallel.shard import spec_of
from megatron_detour.parallel.state import ParallelState

SUMMED = 1 << 22  # elements at once, as a sum in fp64 may copy them


class ParameterRms:
    """For values that lie like the gradients of a parameter group on this data-parallel rank.

    Two ranks, parameters a and b:   rank 0 holds [a0 a1 a2 | a3]    rank 1 holds [a4 b0 b1 | padding]
    All ranks sum the squares of a and of b; each element then gets its parameter's root mean square, padding gets 1.
    """

    def __init__(
        self, parameters: Iterable[tuple[torch.nn.Parameter, int]], partition: torch.Tensor, parallel: ParallelState
    ) -> None:
        """Take parameters with their offsets in the flat vector, and the fp32 weights of this rank's part of it."""
        self._parallel, self._parts, self._counted, elements = parallel, [], [], []
        for number, (parameter, offset) in enumerate(parameters):
            spec, count = spec_of(parameter), parameter.numel()
            elements.append(count // parameter.shape[spec.dim] * spec.size if spec else count)  # without padding
            if part := part_of(parameter, offset, partition, parallel):
                self._parts.append((number, part))
                if parallel.tensor_rank == 0 or spec:  # what all tensor ranks hold a copy of is counted once
                    self._counted.append((number, part))
        self._elements = torch.tensor(elements, dtype=torch.float64, device=partition.device)

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """Replace values, fp32 [elements], and return them. Every rank must call it."""
        squares = torch.zeros_like(self._elements)
        for number, part in self._counted:
            for piece in values[part].split(SUMMED):
                squares[number] += torch.linalg.vector_norm(piece, dtype=torch.float64).square()
        for size, group in (
            (self._parallel.data_size, self._parallel.data_group),
            (self._parallel.tensor_size, self._parallel.tensor_group),
        ):
            if size > 1:
                dist.all_reduce(squares, group=group)
        roots = (squares / self._elements).sqrt()
        values.fill_(1.0)
        for number, part in self._parts:
            values[part] = roots[number]
        return values
