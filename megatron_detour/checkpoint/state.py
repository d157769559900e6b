"""A run's weights and optimizer state by parameter name: out of ZeRO-2's flat partitions and back into them.

Gathered by name they fit any number of ranks and any cut; parallel/zero.py says how ZeRO-2 keeps them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron_detour.errors import DetourError
from megatron_detour.parallel.collectives import unequal_replicas
from megatron_detour.parallel.shard import shard, spec_of, unshard
from megatron_detour.parallel.state import ParallelState
from megatron_detour.parallel.zero import Zero, ZeroGroup

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class TrainingState:
    """Full fp32 tensors by parameter name, on the host: weights, and the moments by kind.

    Moments count where there are steps: a parameter that was never updated has none. Filled again, it uses its tensors
    again: fresh pages cost more than what is written to them.
    """

    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    moments: dict[str, dict[str, torch.Tensor]] = field(default_factory=lambda: {kind: {} for kind in MOMENTS})
    adam_steps: dict[str, int] = field(default_factory=dict)

    def reserve(self, sizes: dict[str, tuple[int, ...]], pinned: bool) -> None:
        """Makes the tensors, `pinned` so that copies off a GPU run at the bus's speed, and touches their pages."""
        for kind in (self.weights, *self.moments.values()):
            for name, size in sizes.items():
                if name not in kind:
                    kind[name] = torch.empty(size, pin_memory=pinned).zero_()


def gather(zero: Zero, into: TrainingState) -> None:
    """Fills `into` with the state of a run, on the first rank; every rank must call it.

    Raises DetourError when tensor ranks hold unequal copies of a replicated parameter or of its moments.
    """
    state = zero.parallel
    for group in zero.groups:
        _gather_group(group, group.partition.data, state, into.weights)
        adam = zero.adam_state(group)
        for kind in MOMENTS if adam else ():
            _gather_group(group, adam[kind], state, into.moments[kind])
        if adam and state.is_first:
            into.adam_steps |= {name: int(adam["step"]) for name, *_ in group.parameters}


def scatter(
    zero: Zero,
    weight: Callable[[str], torch.Tensor],
    moment: Callable[[str, str], torch.Tensor] | None = None,
    adam_steps: dict[str, int] | None = None,
) -> None:
    """Sets master weights and parameters from `weight(name)`, and Adam from `moment(kind, name)` where it has steps.

    Both give full fp32 tensors; every rank takes what it owns.
    """
    state = zero.parallel
    for group in zero.groups:
        partition = group.partition.data
        steps = _steps_of_group([name for name, *_ in group.parameters], adam_steps or {})
        adam = {kind: torch.zeros_like(partition) for kind in MOMENTS} if steps is not None else {}
        for name, parameter, offset in group.parameters:
            local = _cut_for(parameter, weight(name), state)
            parameter.data.copy_(local.view_as(parameter))
            _place(partition, local, offset, state)
            for kind, flat in adam.items():
                _place(flat, _cut_for(parameter, moment(kind, name), state), offset, state)
        if adam:
            zero.set_adam_state(group, adam, steps)


@torch.no_grad()
def reset_optimizer_state(zero: Zero) -> None:
    """Starts Adam anew for what is not frozen; weights stay as they are."""
    for group in zero.groups:
        if not group.options["frozen"]:
            for value in zero.adam_state(group).values():
                value.zero_()


def refuse_unequal_replicas(values: dict[str, torch.Tensor], state: ParallelState) -> None:
    """Raises DetourError unless all tensor ranks hold the same bits; every tensor rank must call it."""
    unequal = unequal_replicas(values, state)
    if unequal:
        raise DetourError(
            f"tensor-parallel copies of {', '.join(unequal[:3])} differ between ranks, which only a fault of a machine "
            "or a library can do; nothing was saved since the last checkpoint, and starting again goes on from there"
        )


def _steps_of_group(names: list[str], adam_steps: dict[str, int]) -> int | None:
    """Adam's steps of the parameters of a group, which are always updated together; None before the first."""
    steps = {adam_steps.get(name) for name in names}
    if len(steps) > 1:
        raise DetourError(
            f"the checkpoint's optimizer has made different numbers of steps for {names[0]} and others of its group; "
            "it is of another run file"
        )
    return steps.pop() if steps else None


def _gather_group(
    group: ZeroGroup, partition: torch.Tensor, state: ParallelState, into: dict[str, torch.Tensor]
) -> None:
    """Puts one kind of value of a group, as full tensors by name, `into` the first rank's; every rank must call it."""
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
    """The parts of all ranks of a group one after the other, flat."""
    part = part.contiguous().view(-1)
    if size == 1:
        return part
    whole = part.new_empty(size * len(part))
    dist.all_gather(list(whole.chunk(size)), part, group=group)
    return whole


def _cut_for(parameter: torch.nn.Parameter, full: torch.Tensor, state: ParallelState) -> torch.Tensor:
    return shard(full, spec_of(parameter), state.tensor_rank, state.tensor_size).contiguous().view(-1)


def _place(partition: torch.Tensor, local: torch.Tensor, offset: int, state: ParallelState) -> None:
    """Copies the stretch of `local`, which lies at `offset` of the flat vector, that this rank's partition covers."""
    first = state.data_rank * len(partition)
    begin, end = max(offset, first), min(offset + len(local), first + len(partition))
    if begin < end:
        partition[begin - first : end - first].copy_(local[begin - offset : end - offset])
