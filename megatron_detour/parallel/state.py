"""Tensor- and data-parallel groups: one ParallelState is created at startup; DeepSpeed takes it as its `mpu`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

COLLECTIVE_TIMEOUT = timedelta(hours=1)  # ranks wait while rank 0 writes a checkpoint to a slow disk


@dataclass(frozen=True)
class ParallelState:
    """Ranks of one tensor-parallel group are adjacent; data-parallel ranks are `tensor_size` apart.

    Groups are None in a single process without torch.distributed. `sequence_parallel` says whether activations between
    the tensor-parallel layers are split by position; it is always false with one tensor rank.
    """

    tensor_rank: int = 0
    tensor_size: int = 1
    data_rank: int = 0
    data_size: int = 1
    tensor_group: dist.ProcessGroup | None = None
    data_group: dist.ProcessGroup | None = None
    sequence_parallel: bool = False

    @classmethod
    def create(cls, tensor_size: int, sequence_parallel: bool = False) -> ParallelState:
        """Create the groups. Collective over all ranks. Raises ValueError if `tensor_size` does not divide them."""
        world, rank = dist.get_world_size(), dist.get_rank()
        if world % tensor_size:
            raise ValueError(f"{world} ranks are not divisible by the tensor-parallel size {tensor_size}")
        data_size = world // tensor_size
        tensor_groups = [_group(range(i * tensor_size, (i + 1) * tensor_size)) for i in range(data_size)]
        data_groups = [_group(range(i, world, tensor_size)) for i in range(tensor_size)]
        data_rank, tensor_rank = divmod(rank, tensor_size)
        return cls(
            tensor_rank,
            tensor_size,
            data_rank,
            data_size,
            tensor_groups[data_rank],
            data_groups[tensor_rank],
            sequence_parallel and tensor_size > 1,
        )

    @property
    def rank(self) -> int:
        return self.data_rank * self.tensor_size + self.tensor_rank

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that prints and writes files."""
        return self.rank == 0

    @property
    def sequence_multiple(self) -> int:
        """The number of positions in a micro-batch must be a multiple of this."""
        return self.tensor_size if self.sequence_parallel else 1

    # The names that DeepSpeed expects of its `mpu`.
    def get_model_parallel_rank(self) -> int:
        return self.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        return self.tensor_size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self.tensor_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return self.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self.data_size

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self.data_group


def _group(ranks: range) -> dist.ProcessGroup:
    return dist.new_group(list(ranks), timeout=COLLECTIVE_TIMEOUT)


def gather_from_all_ranks(value: Any) -> list[Any]:
    """Return every rank's value, a picklable one, in order of rank. Collective over all ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
