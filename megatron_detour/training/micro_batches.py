"""`micro_sequences: auto` at the start of a session: the same choice on every rank, by the least free GPU memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from megatron_detour.config import RunConfig
from megatron_detour.forecast.costs import Sample
from megatron_detour.forecast.micro_batches import MicroBatch, Search, memory_setting
from megatron_detour.model.choose import Choice, choose_compute, run_sizes
from megatron_detour.observe.meter import device_name
from megatron_detour.parallel.state import ParallelState, gather_from_all_ranks
from megatron_detour.plan import Plan
from megatron_detour.run_directory import last_session
from megatron_detour.training.engine import training_dtype
from megatron_detour.training.initial_model import InitialModel


def choose_sizes(
    config: RunConfig, plan: Plan, folder: Path, initial: InitialModel, parallel: ParallelState, device: torch.device
) -> tuple[Plan, dict[str, MicroBatch], Choice]:
    """Choose micro-batches and backends, before the model takes its part of the memory. Collective over all ranks.

    Return the plan with the micro-batches' sizes, these by phase, and the backends. Backends are checked at the sizes
    of the run, which depend on the memory that backends need: if fast ones turn out to be missing, the micro-batches
    shrink to what fits without them.
    """
    ranks, compute = parallel.data_size * parallel.tensor_size, config.compute
    before = _chosen_before(last_session(folder), config, ranks, device) if parallel.is_first else None
    everyone = gather_from_all_ranks((free_gigabytes(device), before))
    gigabytes, before = min(free for free, _ in everyone), everyone[0][1]
    samples = {phase.name: Sample.from_phase(phase) for phase in plan.phases}
    dtype = training_dtype(initial.checked.deepspeed)

    def sized(attention: str, kernels: str) -> tuple[Plan, dict[str, MicroBatch]]:
        setting = memory_setting(config, dtype == torch.bfloat16, ranks, device.type == "cuda", attention, kernels)
        search = Search(plan, initial.shape, setting, samples, gigabytes)
        chosen = search.choose(before)
        return search.with_micro_batches(chosen).plan, chosen

    first, _ = sized(compute.attention, compute.kernels)
    sizes = run_sizes(initial.shape, config.parallel.tensor, first.micro_batches)
    compiled = initial.shape if compute.compile else None
    choice = choose_compute(compute.attention, compute.kernels, compute.recompute, sizes, device, dtype, compiled)
    return *sized(choice.attention, choice.kernels), choice


def free_gigabytes(device: torch.device) -> float:
    """Return the free memory of a GPU; infinity for a CPU, where `auto` is small."""
    return torch.cuda.mem_get_info(device)[0] / 1e9 if device.type == "cuda" else math.inf


def _chosen_before(session: dict[str, Any], config: RunConfig, ranks: int, device: torch.device) -> dict[str, int]:
    """Return what `auto` chose in a session with the same ranks, device and recomputation, by phase."""
    here = {
        "ranks": ranks,
        "tensor_parallel": config.parallel.tensor,
        "device": device_name(device),
        "recompute": config.compute.recompute,
    }
    sizes, names = session.get("micro_sequences"), session.get("chosen_by_auto")
    if not isinstance(sizes, dict) or not isinstance(names, dict):
        return {}
    if any(session.get(key) != value for key, value in here.items()):
        return {}
    return {name: sizes[name] for name in names if type(sizes.get(name)) is int and sizes[name] > 0}
