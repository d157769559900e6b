"""The forecast of a run, assembled from its parts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_detour.config import RunConfig
from megatron_detour.config.deepspeed import is_bf16
from megatron_detour.errors import nearest
from megatron_detour.forecast import costs, memory, storage
from megatron_detour.forecast.costs import ASSUMED_SHARE, PhaseCost, Sample, Speed, phase_cost
from megatron_detour.forecast.memory import Memory, Setting
from megatron_detour.forecast.micro_batches import MicroBatch, Search, memory_setting
from megatron_detour.forecast.storage import Disk, Reading
from megatron_detour.forecast.warnings import warnings
from megatron_detour.model import roofline
from megatron_detour.model.families import Family
from megatron_detour.model.peaks import NAMES as PEAK_NAMES
from megatron_detour.model.peaks import chip
from megatron_detour.plan import Plan
from megatron_detour.preflight import Preflight, preflight


@dataclass(frozen=True)
class Forecast:
    """None stands for unknown values; `faults` and `notes` say why."""

    name: str
    ranks: int
    device: str  # a GPU's name, or cpu
    gpu_memory: float  # GB
    origin: str  # of the model
    shape: Family | None
    parameters: int | None  # of the whole model
    setting: Setting | None
    memory: dict[str, Memory] | None  # of one rank, by phase
    micro_batches: dict[str, MicroBatch] | None  # by phase
    advice: str | None  # a change that makes it fit, or a larger micro-batch that fits as well
    speed: Speed
    costs: tuple[PhaseCost, ...] | None
    readings: tuple[Reading, ...]
    disk: Disk | None
    time_limit: int | None  # seconds
    faults: tuple[str, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def most_memory(self) -> Memory | None:
        return max(self.memory.values(), key=lambda m: m.counted) if self.memory else None

    @property
    def flops(self) -> int | None:
        return sum(cost.flops for cost in self.costs) if self.costs else None

    @property
    def seconds(self) -> float | None:
        if not self.costs or any(cost.seconds is None for cost in self.costs):
            return None
        return sum(cost.seconds for cost in self.costs)

    @property
    def sessions(self) -> int | None:
        return None if self.seconds is None else costs.sessions(self.seconds, self.time_limit)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, in bytes, seconds, tokens and FLOP."""
        raw = dataclasses.asdict(self)
        if self.memory:
            for name, peak in self.memory.items():
                raw["memory"][name] |= {
                    "needed": peak.needed,
                    "fits": {str(card): peak.fits(card) for card in memory.CARDS},
                }
        for entry, reading in zip(raw["readings"], self.readings, strict=True):
            entry["epochs"] = reading.epochs
        if self.disk:
            raw["disk"]["needed"] = self.disk.needed
        raw["speed"]["assumed_share_of_roofline"] = ASSUMED_SHARE if self.speed.is_modeled else None
        return raw | {"flops": self.flops, "seconds": self.seconds, "sessions": self.sessions}


def forecast(
    config: RunConfig,
    plan: Plan,
    ranks: int = 1,
    *,
    checked: Preflight | None = None,
    device: str | None = None,
    gpu_memory: float = 80,
    rate: float | None = None,
    mfu: float | None = None,
    attention: str | None = None,
    kernels: str | None = None,
) -> Forecast:
    """Forecast a run on `ranks` GPUs. Missing files and invalid values become faults, notes and None, not errors.

    checked: the result of preflight(config, plan, ranks), if available
    device: a GPU's name, by default "h100" for bf16 and "cpu" for fp32; gpu_memory: GB per GPU
    rate: measured tokens per second per GPU; without it, time follows from the device's peak and `mfu`; without both,
    from its roofline
    attention, kernels: those that are used, by default the run file's
    """
    notes: list[str] = []
    checked = checked or preflight(config, plan, ranks, gpu=device and device != "cpu")
    bf16 = checked.deepspeed is None or is_bf16(checked.deepspeed)
    device = device or ("h100" if bf16 else "cpu")
    attempt = _Attempt(notes)
    on_gpu, attention = device != "cpu", attention or config.compute.attention
    setting = memory_setting(config, bf16, ranks, on_gpu, attention, kernels or config.compute.kernels)
    speed = Speed(rate, mfu, chip(device) if bf16 else None, attention if attention in roofline.ATTENTION else "varlen")
    if not speed.known:
        hint = nearest(device, PEAK_NAMES)
        name = repr(device) if bf16 else f"{device!r} in fp32"
        notes.append(f"time: the peak of {name} is unknown{hint}; set a measured rate with --rate")
    new_rows = len(checked.new_rows)
    shape, parameters = checked.shape, checked.shape and checked.shape.parameters
    samples = attempt("time", lambda: {phase.name: Sample.from_phase(phase) for phase in plan.phases}) or {}
    by_phase = advice = phase_costs = None
    search = shape and Search(plan, shape, setting, samples, gpu_memory if on_gpu else math.inf)
    chosen = search and attempt("memory", search.choose)
    if chosen:
        search = search.with_micro_batches(chosen)
        by_phase, advice = attempt("memory", search.memory), attempt("memory", search.advice)
        phase_costs = samples and attempt("time", lambda: _costs(config, search, speed, ranks))
    readings = tuple(attempt("epochs", lambda: storage.readings(plan)) or ())
    disk = attempt("disk", lambda: storage.disk(config, plan, parameters)) if parameters else None
    return Forecast(
        name=config.name,
        ranks=ranks,
        device=device,
        gpu_memory=gpu_memory,
        origin=" ".join(filter(None, [config.model.start or "model.config", checked.note and f"({checked.note})"])),
        shape=shape,
        parameters=parameters,
        setting=setting,
        memory=by_phase,
        micro_batches=chosen,
        advice=advice,
        speed=speed,
        costs=phase_costs,
        readings=readings,
        disk=disk,
        time_limit=config.time_limit,
        faults=checked.faults,
        warnings=tuple(attempt("warnings", lambda: warnings(config, plan, list(readings), disk, new_rows)) or ()),
        notes=tuple(notes),
    )


class _Attempt:
    """Calls functions whose errors must not end a run: an error becomes a note and None."""

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes

    def __call__(self, what: str, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except Exception as error:  # from damaged files or unusual machines
            self.notes.append(f"{what}: unknown: {type(error).__name__}: {error}")
            return None


def _costs(config: RunConfig, search: Search, speed: Speed, ranks: int) -> tuple[PhaseCost, ...]:
    recompute, tensor = config.compute.recompute, config.parallel.tensor
    return tuple(
        phase_cost(search.shape, phase, search.samples[phase.name], recompute, speed, ranks, tensor)
        for phase in search.plan.phases
    )
