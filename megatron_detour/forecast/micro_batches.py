"""Micro-batches: which fit into a GPU's memory, and the choice of `micro_sequences: auto`."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from megatron_detour.config import RunConfig
from megatron_detour.data.order import balance, rank_micro_batches
from megatron_detour.forecast import memory
from megatron_detour.forecast.costs import Sample
from megatron_detour.forecast.memory import Load, Memory, Setting
from megatron_detour.model.families import Family
from megatron_detour.model.flops import Frozen
from megatron_detour.plan import Plan, PlannedPhase

# Tokens of a micro-batch that `auto` aims at. A GPU waits for the host's launches with few tokens (docs/performance.md)
# and gains nothing with more; a CPU's products are at full speed with fewer.
GPU_AIM, CPU_AIM = 65_536, 2_048


@dataclass(frozen=True)
class MicroBatch:
    """The micro-batches of a phase."""

    sequences: int
    tokens: int  # about, as documents stay whole
    why: str | None = None  # auto chose this number; None: the run file sets it

    def __str__(self) -> str:
        why = f" (auto: {self.why})" if self.why else ""
        return f"{self.sequences} x {self.tokens // self.sequences:,} tokens{why}"


def memory_setting(
    config: RunConfig, bf16: bool, ranks: int, on_gpu: bool, attention: str = "auto", kernels: str = "auto"
) -> Setting:
    """Return the settings that determine memory.

    `auto` attention and kernels mean FlashAttention and Triton on a GPU in bf16, else SDPA and plain kernels.
    """
    fast = bf16 and on_gpu
    return Setting(
        bf16=bf16,
        tensor=config.parallel.tensor,
        data=max(ranks // config.parallel.tensor, 1),
        sequence_parallel=config.parallel.sequence and config.parallel.tensor > 1,
        recompute=config.compute.recompute,
        flash=fast and attention != "sdpa",
        fused=fast and kernels != "plain",
        on_gpu=on_gpu,
        optimizer_bytes=config.optimizer.bytes_per_parameter,
    )


@dataclass(frozen=True)
class Search:
    """Search for settings of a run that fit a GPU's memory."""

    plan: Plan
    shape: Family
    setting: Setting
    samples: dict[str, Sample]  # by phase
    gigabytes: float  # of a rank

    def choose(self, before: dict[str, int] | None = None) -> dict[str, MicroBatch]:
        """Return the micro-batches of each phase: those of the run file, or the choice of `auto`.

        before: what `auto` chose in the run's last session. It is kept where it fits, so that the run resumes bit for
        bit.
        """
        return {phase.name: self._choose(phase, (before or {}).get(phase.name)) for phase in self.plan.phases}

    def with_micro_batches(self, chosen: dict[str, MicroBatch]) -> Search:
        """Return the search with these micro-batches in its plan."""
        return replace(self, plan=self.plan.with_micro_sequences({name: one.sequences for name, one in chosen.items()}))

    def _choose(self, phase: PlannedPhase, before: int | None) -> MicroBatch:
        length = phase.sequence_length
        if phase.micro_sequences is not None:
            return MicroBatch(phase.micro_sequences, phase.micro_sequences * length)
        if before and self._fits(phase, before):
            return MicroBatch(before, before * length, "as in the session before")
        aim = GPU_AIM if self.setting.on_gpu else CPU_AIM
        share = math.ceil(phase.sequences / self.setting.data)
        # Equal micro-batches: the nominal sizes with which a rank's share of the step takes 1, 2, 3, ... of them.
        fewest = math.ceil(share / max(aim // length, 1))
        sizes = sorted({math.ceil(share / count) for count in range(fewest, share + 1)})
        fitting = sizes[: bisect_left(sizes, True, key=lambda size: not self._fits(phase, size))]
        chosen = (fitting or sizes)[-1 if fitting else 0]
        if not fitting:
            why = f"no more than 1 where {self.gigabytes:.3g} GB are too few"
        elif fitting != sizes:
            why = f"the most that fits {self.gigabytes:.3g} GB"
        elif chosen == share:
            why = "a rank's whole share of a step"
        else:
            why = f"close to {aim:,} tokens"
        return MicroBatch(chosen, chosen * length, why)

    def memory(self, recompute: str | None = None, share: float = 1) -> dict[str, Memory]:
        """Return the peak memory by phase, with micro-batches scaled by `share`. The plan has chosen their sizes."""
        setting = replace(self.setting, recompute=recompute or self.setting.recompute)
        return {phase.name: self._peak(phase, phase.micro_sequences * share, setting) for phase in self.plan.phases}

    def fits(self, recompute: str | None = None, share: float = 1) -> bool:
        return all(peak.fits(self.gigabytes) for peak in self.memory(recompute, share).values())

    def advice(self) -> str | None:
        """Return the first change that makes the run fit, in the order of docs/parallelism.md, or, if it fits, the
        larger micro-batches that `auto` would choose. The plan has chosen the sizes of all micro-batches."""
        if not self.setting.on_gpu:
            return None
        if self.fits():
            return self._larger()
        micro = min(phase.micro_sequences for phase in self.plan.phases)
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

    def _larger(self) -> str | None:
        for phase in self.plan.phases:
            chosen = self._choose(replace(phase, micro_sequences=None), None)
            if chosen.sequences > phase.micro_sequences:
                return (
                    f"batch.micro_sequences=auto would choose {chosen.sequences} in {phase.name}, which fits as well "
                    "and may be faster"
                )
        return None

    def _fits(self, phase: PlannedPhase, sequences: int) -> bool:
        return self._peak(phase, sequences, self.setting).fits(self.gigabytes)

    def _peak(self, phase: PlannedPhase, sequences: float, setting: Setting) -> Memory:
        peaks = (memory.peak_memory(self.shape, setting, load) for load in self._loads(phase, sequences))
        return max(peaks, key=lambda peak: peak.counted)

    def _loads(self, phase: PlannedPhase, sequences: float) -> Iterator[Load]:
        """Yield the fullest micro-batch of each part of the objective: as documents stay whole, it may exceed its
        nominal size."""
        positions = max(round(sequences), 1) * phase.sequence_length
        sample, mean, step = (
            self.samples.get(phase.name),
            phase.sequence_length,
            phase.sequences * phase.sequence_length,
        )
        if sample is not None:
            mean = sample.mean_document
            _, count = rank_micro_batches(step, positions, 0, self.setting.data)
            lengths = np.array(sample.step(step), dtype=np.int64)
            positions = max(positions, *(int(lengths[mine].sum()) for mine in balance(lengths, count)))
        for _, part in phase.objective.parts():
            labeled = round(positions * part.labeled_share(mean, phase.tokens))
            yield Load(positions, labeled, part.causal, Frozen.from_parts(phase.settings.freeze).below)
