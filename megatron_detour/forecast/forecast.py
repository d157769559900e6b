"""The forecast of a run, assembled from its parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_detour.config import RunConfig
from megatron_detour.config.deepspeed import is_bf16
from megatron_detour.data.order import balance, rank_micro_batches
from megatron_detour.errors import nearest
from megatron_detour.forecast import costs, memory, storage
from megatron_detour.forecast.costs import PhaseCost, Speed
from megatron_detour.forecast.memory import Load, Memory, Setting
from megatron_detour.forecast.storage import Disk, Reading
from megatron_detour.forecast.warnings import warnings
from megatron_detour.model.families import Family
from megatron_detour.model.flops import Frozen
from megatron_detour.model.peaks import NAMES as PEAK_NAMES
from megatron_detour.model.peaks import peak_flops
from megatron_detour.plan import Plan, PlannedPhase
from megatron_detour.preflight import Preflight, preflight

MFU = 0.25  # default; by this count the paper's runs reach 0.23 to 0.30


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
        for cost in raw["costs"] or ():
            del cost["lengths"]
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
) -> Forecast:
    """Forecast a run on `ranks` GPUs. Missing files and invalid values become faults, notes and None, not errors.

    checked: the result of preflight(config, plan, ranks), if available
    device: a GPU's name, by default "h100" for bf16 and "cpu" for fp32; gpu_memory: GB per GPU
    rate: measured tokens per second per GPU; without it, time follows from the device's peak and `mfu` (0.25)
    """
    notes: list[str] = []
    checked = checked or preflight(config, plan, ranks, gpu=device and device != "cpu")
    bf16 = checked.deepspeed is None or is_bf16(checked.deepspeed)
    device = device or ("h100" if bf16 else "cpu")
    attempt = _Attempt(notes)
    setting = checked.deepspeed and attempt("memory", lambda: memory_setting(config, bf16, ranks, device))
    speed = Speed(rate, None if rate else mfu or MFU, peak_flops(device, bf16))
    if not speed.known:
        hint = nearest(device, PEAK_NAMES)
        name = repr(device) if bf16 else f"{device!r} in fp32"
        notes.append(f"time: the peak of {name} is unknown{hint}; set a measured rate with --rate")
    shape = checked.shape
    parameters = shape and shape.parameters
    phase_costs = shape and attempt("time", lambda: _costs(config, plan, shape, speed, ranks))
    by_phase = advice = None
    if shape and setting:
        search = Search(plan, shape, setting, {cost.name: cost for cost in phase_costs or ()}, gpu_memory)
        rank_sequences = config.batch.sequences // setting.data
        by_phase = attempt("memory", search.memory)
        advice = attempt("memory", lambda: search.advice(config.batch.micro_sequences, rank_sequences))
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
        advice=advice,
        speed=speed,
        costs=phase_costs,
        readings=readings,
        disk=disk,
        time_limit=config.time_limit,
        faults=checked.faults,
        warnings=tuple(attempt("warnings", lambda: warnings(config, plan, list(readings), disk)) or ()),
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


def memory_setting(config: RunConfig, bf16: bool, ranks: int, device: str) -> Setting:
    """Return the settings; `auto` means FlashAttention and Triton on a GPU in bf16, else SDPA and plain kernels."""
    fast = bf16 and device != "cpu"
    return Setting(
        bf16=bf16,
        tensor=config.parallel.tensor,
        data=max(ranks // config.parallel.tensor, 1),
        sequence_parallel=config.parallel.sequence and config.parallel.tensor > 1,
        recompute=config.compute.recompute,
        flash=fast and config.compute.attention != "sdpa",
        fused=fast and config.compute.kernels != "plain",
        on_gpu=device != "cpu",
        optimizer_bytes=config.optimizer.kind.bytes_per_parameter(),
    )


@dataclass(frozen=True)
class Search:
    """Search for settings of a run that fit a GPU's memory."""

    plan: Plan
    shape: Family
    setting: Setting
    costs: dict[str, PhaseCost]  # by phase
    gigabytes: float

    def memory(self, recompute: str | None = None, share: float = 1) -> dict[str, Memory]:
        """Return the peak memory by phase, with micro-batches scaled by `share`."""
        setting = replace(self.setting, recompute=recompute or self.setting.recompute)
        return {
            phase.name: memory.peak_memory(self.shape, setting, self._load(phase, share)) for phase in self.plan.phases
        }

    def fits(self, recompute: str | None = None, share: float = 1) -> bool:
        return all(peak.fits(self.gigabytes) for peak in self.memory(recompute, share).values())

    def advice(self, micro: int, rank_sequences: int) -> str | None:
        """Return the first change that makes the run fit, in the order of docs/parallelism.md, or, if it fits, a larger
        micro-batch that fits as well. `rank_sequences`: sequences per step of a data-parallel rank."""
        if not self.setting.on_gpu:
            return None
        if self.fits():
            larger = [size for size in range(micro + 1, rank_sequences + 1) if rank_sequences % size == 0]
            fitting = [size for size in larger if self.fits(share=size / micro)]
            return f"batch.micro_sequences={max(fitting)} would fit as well, and may be faster" if fitting else None
        choices = {"none": ["none", "selective", "full"], "selective": ["selective", "full"]}
        for recompute in choices.get(self.setting.recompute, ["full"]):
            if recompute == "selective" and self.setting.tensor > 1:
                continue
            for size in (size for size in range(micro, 0, -1) if micro % size == 0):
                if self.fits(recompute, size / micro):
                    changes = [f"batch.micro_sequences={size}"] if size != micro else []
                    changes += [f"compute.recompute={recompute}"] if recompute != self.setting.recompute else []
                    return f"with {' and '.join(changes)} it fits"
        return (
            "batch.micro_sequences=1 and compute.recompute=full are not enough: set parallel.tensor=2 with "
            "parallel.sequence=true, or shorten data.sequence_length"
        )

    def _load(self, phase: PlannedPhase, share: float) -> Load:
        """Return the fullest micro-batch: as documents stay whole, it may exceed micro_sequences."""
        positions = max(round(phase.micro_sequences * share), 1) * phase.sequence_length
        cost, mean = self.costs.get(phase.name), phase.sequence_length
        if cost is not None:
            mean = cost.mean_document
            _, count = rank_micro_batches(phase.sequences * phase.sequence_length, positions, 0, self.setting.data)
            lengths = np.array(cost.lengths, dtype=np.int64)
            positions = max(positions, *(int(lengths[mine].sum()) for mine in balance(lengths, count)))
        labeled = round(positions * phase.objective.labeled_share(mean))
        return Load(positions, labeled, phase.objective.causal, Frozen.from_parts(phase.settings.freeze).below)


def _costs(config: RunConfig, plan: Plan, shape: Family, speed: Speed, ranks: int) -> tuple[PhaseCost, ...]:
    return tuple(costs.phase_cost(shape, phase, config.compute.recompute, speed, ranks) for phase in plan.phases)
