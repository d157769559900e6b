"""A run's weights and optimiser state by parameter name: out of ZeRO-2's flat partitions and back into them.

ZeRO-2 keeps, for each parameter group, the fp32 weights and Adam's moments of all its parameters in one flat vector,
cut into equal parts over the data-parallel ranks. Gathered by name they fit any number of ranks and any cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_detour.errors import DetourError
from megatron_detour.parallel.replicas import unequal_replicas
from megatron_detour.parallel.shard import cut, join, spec_of
from megatron_detour.parallel.state import ParallelState

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TrainingState:
    """Full fp32 tensors by parameter name, on the host: weights, and the moments by kind."""

    weights: dict[str, torch.Tensor]
    moments: dict[str, dict[str, torch.Tensor]]
    adam_steps: int


def gather(engine: DeepSpeedEngine, state: ParallelState) -> TrainingState | None:
    """The state of a run, on the first rank; None on the others. Every rank must call it.

    Raises DetourError when tensor ranks hold unequal copies of a replicated parameter or of its moments.
    """
    zero = engine.optimizer
    adam_steps = 0
    if _adam_state(zero, 0):
        adam_steps = int(_adam_state(zero, 0)["step"])
    weights = _gather_kind(engine, state, lambda group: zero.single_partition_of_fp32_groups[group].data)
    moments = {
        kind: _gather_kind(engine, state, lambda group, kind=kind: _adam_state(zero, group)[kind])
        for kind in (MOMENTS if adam_steps else ())
    }
    return TrainingState(weights, moments, adam_steps) if state.is_first else None


def scatter(
    engine: DeepSpeedEngine,
    state: ParallelState,
    weight: Callable[[str], torch.Tensor],
    moment: Callable[[str, str], torch.Tensor] | None = None,
    adam_steps: int = 0,
) -> None:
    """Sets master weights and parameters from `weight(name)`, and with `adam_steps` Adam from `moment(kind, name)`.

    Both give full fp32 tensors; every rank takes what it owns.
    """
    zero = engine.optimizer
    for group, parameters in enumerate(_layout(engine)):
        partition = zero.single_partition_of_fp32_groups[group]
        adam = {kind: torch.zeros_like(partition.data) for kind in MOMENTS} if adam_steps else {}
        for name, parameter, offset in parameters:
            local = _cut_for(parameter, weight(name), state)
            parameter.data.copy_(local.view_as(parameter))
            _place(partition.data, local, offset, state)
            for kind, flat in adam.items():
                _place(flat, _cut_for(parameter, moment(kind, name), state), offset, state)
        if adam_steps:
            fused = zero.optimizer.param_groups[group].get("fused")
            step = torch.tensor(float(adam_steps), device=partition.device if fused else "cpu")
            zero.optimizer.state[partition] = {"step": step, **adam}


def refuse_unequal_replicas(values: dict[str, torch.Tensor], state: ParallelState) -> None:
    """Raises DetourError unless all tensor ranks hold the same bits; every tensor rank must call it."""
    unequal = unequal_replicas(values, state)
    if unequal:
        raise DetourError(
            f"tensor-parallel copies of {', '.join(unequal[:3])} differ between ranks, which only a fault of a machine "
            "or a library can do; nothing was saved since the last checkpoint, and starting again goes on from there"
        )


def _layout(engine: DeepSpeedEngine) -> Iterator[list[tuple[str, torch.nn.Parameter, int]]]:
    """For each parameter group: (name, parameter, offset in the group's flat vector)."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    zero = engine.optimizer
    for parameters, offsets in zip(zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets, strict=True):
        yield [(names[id(p)], p, offset) for p, offset in zip(parameters, offsets, strict=True)]


def _adam_state(zero, group: int) -> dict[str, torch.Tensor]:
    return zero.optimizer.state.get(zero.single_partition_of_fp32_groups[group], {})


def _gather_kind(
    engine: DeepSpeedEngine, state: ParallelState, partition_of: Callable[[int], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Full tensors by name on the first rank, of one kind of value; empty on the others."""
    full: dict[str, torch.Tensor] = {}
    for group, parameters in enumerate(_layout(engine)):
        flat = _all_gather(partition_of(group), state.data_group, state.data_size)
        if state.data_rank:
            continue
        local_of = {name: flat[offset : offset + p.numel()].view_as(p) for name, p, offset in parameters}
        refuse_unequal_replicas({name: local_of[name] for name, p, _ in parameters if spec_of(p) is None}, state)
        for name, parameter, _ in parameters:
            local = local_of[name]
            spec = spec_of(parameter)
            shards = [local]
            if spec is not None and state.tensor_size > 1:
                shards = list(_all_gather(local, state.tensor_group, state.tensor_size).chunk(state.tensor_size))
                shards = [shard.view_as(parameter) for shard in shards]
            if state.is_first:
                full[name] = join(shards, spec).to("cpu", copy=True)
    return full


def _all_gather(part: torch.Tensor, group: dist.ProcessGroup | None, size: int) -> torch.Tensor:
    """The parts of all ranks of a group one after the other, flat."""
    part = part.contiguous().view(-1)
    if size == 1:
        return part
    whole = part.new_empty(size * len(part))
    dist.all_gather(list(whole.chunk(size)), part, group=group)
    return whole


def _cut_for(parameter: torch.nn.Parameter, full: torch.Tensor, state: ParallelState) -> torch.Tensor:
    return cut(full, spec_of(parameter), state.tensor_rank, state.tensor_size).contiguous().view(-1)


def _place(partition: torch.Tensor, local: torch.Tensor, offset: int, state: ParallelState) -> None:
    """Copies the stretch of `local`, which lies at `offset` of the flat vector, that this rank's partition covers."""
    first = state.data_rank * len(partition)
    begin, end = max(offset, first), min(offset + len(local), first + len(partition))
    if begin < end:
        partition[begin - first : end - first].copy_(local[begin - offset : end - offset])
