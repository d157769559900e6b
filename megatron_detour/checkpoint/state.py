"""Convert a run's weights and optimizer state between ZeRO-2's flat partitions and full tensors by parameter name.

Full tensors fit any number of ranks and any tensor-parallel size; parallel/zero.py describes the partitions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron_detour.errors import DetourError
from megatron_detour.parallel.collectives import unequal_replicas
from megatron_detour.parallel.shard import shard, spec_of, unshard
from megatron_detour.parallel.state import ParallelState
from megatron_detour.parallel.zero import EMA, Zero, ZeroGroup


@dataclass
class TrainingState:
    """Full fp32 tensors by parameter name, in host memory: weights, and the optimizer's states by their names.

    A parameter without steps was never updated, and its states are meaningless; 0 steps: the optimizer does not count.
    Tensors are reused by every save: touching fresh pages costs more than writing to them.
    """

    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    states: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)

    def reserve(self, sizes: dict[str, tuple[int, ...]], states: tuple[str, ...], pinned: bool) -> None:
        """Allocate the tensors and touch their pages; `pinned` memory lets a GPU copy at full bus speed."""
        for tensors in (self.weights, *(self.states.setdefault(state, {}) for state in states)):
            missing = {name: size for name, size in sizes.items() if name not in tensors}
            counts = [math.prod(size) for size in missing.values()]
            flat = torch.empty(sum(counts)).zero_()
            if pinned and counts:
                # Registered, as torch's allocator of pinned memory rounds each tensor up to a power of two.
                torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), flat.nbytes, 0)
            for (name, size), part in zip(missing.items(), flat.split(counts), strict=True):
                tensors[name] = part.view(size)


def gather(zero: Zero, into: TrainingState) -> None:
    """Fill `into` with the state of a run, on the first rank; every rank must call it.

    Raise DetourError when tensor-parallel ranks hold unequal copies of a replicated parameter or its states.
    """
    parallel = zero.parallel
    for group in zero.groups:
        _gather_group(group, group.partition.data, parallel, into.weights)
        held = zero.optimizer_state(group)
        for state in zero.states if held else ():
            _gather_group(group, held[state], parallel, into.states.setdefault(state, {}))
        if held and parallel.is_first:
            into.steps |= {name: int(held.get("step", 0)) for name, *_ in group.parameters}


def scatter(
    zero: Zero,
    weight: Callable[[str], torch.Tensor],
    state: Callable[[str, str], torch.Tensor] | None = None,
    steps: dict[str, int] | None = None,
) -> None:
    """Set master weights and parameters from `weight(name)`, and the optimizer's states from `state(which, name)`.

    Both return full fp32 tensors, of which every rank copies its shard. Parameters without steps get no states.
    """
    parallel = zero.parallel
    for group in zero.groups:
        partition = group.partition.data
        done = _steps_of_group([name for name, *_ in group.parameters], steps or {})
        held = {which: torch.zeros_like(partition) for which in zero.states} if done is not None else {}
        for name, parameter, offset in group.parameters:
            local = _local_shard(parameter, weight(name), parallel)
            parameter.data.copy_(local.view_as(parameter))
            _place(partition, local, offset, parallel)
            for which, flat in held.items():
                _place(flat, _local_shard(parameter, state(which, name), parallel), offset, parallel)
        if done is not None:
            zero.set_optimizer_state(group, held, done)


@torch.no_grad()
def reset_optimizer_state(zero: Zero) -> None:
    """Zero the optimizer's states of the parameters that are not frozen; weights and their average do not change."""
    for group in zero.groups:
        if not group.options["frozen"]:
            for name, value in zero.optimizer_state(group).items():
                if name != EMA:
                    value.zero_()


def refuse_unequal_replicas(values: dict[str, torch.Tensor], state: ParallelState) -> None:
    """Raise DetourError unless all tensor-parallel ranks hold the same bits; all of them must call it."""
    unequal = unequal_replicas(values, state)
    if unequal:
        raise DetourError(
            f"tensor-parallel copies of {', '.join(unequal[:3])} differ between ranks: a hardware or library fault; "
            "nothing was saved since; run the same command to resume from the last checkpoint"
        )


def _steps_of_group(names: list[str], steps: dict[str, int]) -> int | None:
    """Return the updates of a group, whose parameters are always updated together; None before step 1."""
    counts = {steps.get(name) for name in names}
    if len(counts) > 1:
        raise DetourError(
            f"the checkpoint's optimizer has different step counts for {names[0]} and the rest of its group; it "
            "belongs to another run file"
        )
    return counts.pop() if counts else None


def _gather_group(
    group: ZeroGroup, partition: torch.Tensor, state: ParallelState, into: dict[str, torch.Tensor]
) -> None:
    """Gather one kind of value of a group as full tensors `into` the first rank's dict; every rank must call it."""
    flat = _all_gather(partition, state.data_group, state.data_size)
    if state.data_rank:
        return
    local_of = {name: flat[offset : offset + p.numel()].view_as(p) for name, p, offset in group.parameters}
    refuse_unequal_replicas({name: local_of[name] for name, p, _ in group.parameters if spec_of(p) is None}, state)
    for name, parameter, _ in group.parameters:
        shards, spec = [local_of[name]], spec_of(parameter)
        if spec is not None and state.tensor_size > 1:
            shards = list(_all_gather(shards[0], state.tensor_group, state.tensor_size).chunk(state.tensor_size))
            shards = [shard.view_as(parameter) for shard in shards]
        if state.is_first:
            full = unshard(shards, spec)
            into.setdefault(name, torch.empty(0)).resize_(full.shape).copy_(full)


def _all_gather(part: torch.Tensor, group: dist.ProcessGroup | None, size: int) -> torch.Tensor:
    """Return the parts of all ranks of a group, concatenated and flat."""
    part = part.contiguous().view(-1)
    if size == 1:
        return part
    whole = part.new_empty(size * len(part))
    dist.all_gather(list(whole.chunk(size)), part, group=group)
    return whole


def _local_shard(parameter: torch.nn.Parameter, full: torch.Tensor, state: ParallelState) -> torch.Tensor:
    return shard(full, spec_of(parameter), state.tensor_rank, state.tensor_size).contiguous().view(-1)


def _place(partition: torch.Tensor, local: torch.Tensor, offset: int, state: ParallelState) -> None:
    """Copy the range of `local` that this rank's partition covers; `local` starts at `offset` of the flat vector."""
    first = state.data_rank * len(partition)
    begin, end = max(offset, first), min(offset + len(local), first + len(partition))
    if begin < end:
        partition[begin - first : end - first].copy_(local[begin - offset : end - offset])
