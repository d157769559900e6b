"""Time as a pure function of tokens: what a step does follows from the run file and the tokens consumed, and from
nothing else. Nothing here is saved to resume."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron_detour.config import LearningRate, Phase, RunConfig


@dataclass(frozen=True)
class PlannedPhase:
    """A phase rounded up to whole steps. `start` and `tokens` are amounts of tokens of the run."""

    name: str
    objective: str
    mask_rate: float | None
    whole_word_masking: bool
    learning_rate: LearningRate
    first_step: int  # 1-based
    steps: int
    start: int
    tokens: int

    @property
    def end(self) -> int:
        return self.start + self.tokens


@dataclass(frozen=True)
class Step:
    """One optimiser step. `tokens` are those consumed once it is done."""

    number: int  # 1-based
    phase: PlannedPhase
    learning_rate: float
    first_sequence: int
    sequences: int
    tokens: int
    ends_phase: bool


@dataclass(frozen=True)
class Plan:
    name: str
    sequence_length: int
    sequences_per_step: int
    phases: tuple[PlannedPhase, ...]

    @classmethod
    def of(cls, config: RunConfig) -> Plan:
        phases: list[PlannedPhase] = []
        for phase in config.phases:
            steps = math.ceil(phase.tokens / config.tokens_per_step)
            done = sum(p.steps for p in phases)
            phases.append(_planned(phase, done, steps, config.tokens_per_step))
        return cls(config.name, config.data.sequence_length, config.batch.sequences, tuple(phases))

    @property
    def tokens_per_step(self) -> int:
        return self.sequence_length * self.sequences_per_step

    @property
    def total_steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    @property
    def total_tokens(self) -> int:
        return self.total_steps * self.tokens_per_step

    def at(self, tokens: int) -> Step:
        """The step that begins when `tokens` have been consumed. Raises ValueError outside the run or inside a step."""
        if tokens % self.tokens_per_step or not 0 <= tokens < self.total_tokens:
            raise ValueError(f"no step begins at {tokens} tokens")
        phase = next(phase for phase in self.phases if tokens < phase.end)
        after = tokens + self.tokens_per_step
        return Step(
            number=after // self.tokens_per_step,
            phase=phase,
            learning_rate=learning_rate(phase, after - phase.start),
            first_sequence=tokens // self.sequence_length,
            sequences=self.sequences_per_step,
            tokens=after,
            ends_phase=after == phase.end,
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "tokens_per_step": self.tokens_per_step,
            "sequence_length": self.sequence_length,
            "sequences_per_step": self.sequences_per_step,
            "total_steps": self.total_steps,
            "total_tokens": self.total_tokens,
            "phases": [
                {
                    "name": phase.name,
                    "objective": phase.objective,
                    "mask_rate": phase.mask_rate,
                    "whole_word_masking": phase.whole_word_masking,
                    "first_step": phase.first_step,
                    "steps": phase.steps,
                    "tokens": phase.tokens,
                    "start_tokens": phase.start,
                    "end_tokens": phase.end,
                    "learning_rate": {
                        "peak": phase.learning_rate.peak,
                        "warmup_tokens": phase.learning_rate.warmup,
                        "shape": phase.learning_rate.shape,
                        "end": phase.learning_rate.end,
                    },
                }
                for phase in self.phases
            ],
        }

    def table(self) -> str:
        """The plan as aligned text, a row a phase."""
        head = ("phase", "objective", "steps", "tokens", "from step", "to step", "ends at", "learning rate")
        rows = [
            (
                phase.name,
                phase.objective
                + (f" {phase.mask_rate:.0%}" if phase.mask_rate else "")
                + (", words" if phase.whole_word_masking else ""),
                f"{phase.steps:,}",
                f"{phase.tokens:,}",
                f"{phase.first_step:,}",
                f"{phase.first_step + phase.steps - 1:,}",
                f"{phase.end:,} tokens",
                describe_rate(phase.learning_rate),
            )
            for phase in self.phases
        ]
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
        summary = (
            f"{self.name}: {' + '.join(f'{p.steps:,}' for p in self.phases)} = {self.total_steps:,} steps of "
            f"{self.tokens_per_step:,} tokens ({self.sequences_per_step:,} sequences of {self.sequence_length:,}), "
            f"{self.total_tokens:,} tokens in all"
        )
        return "\n".join([summary, *(line.rstrip() for line in lines)])


def learning_rate(phase: PlannedPhase, done: int) -> float:
    """The rate of the step that brings the phase to `done` tokens: above zero at the first, the end at the last.

    1-sqrt (recipe of ModernBERT's decay): end + (peak - end) * (1 - sqrt(x)), x the share of the phase after warm-up.
    """
    rate = phase.learning_rate
    if done < rate.warmup:
        return rate.peak * done / rate.warmup
    if rate.shape == "constant":
        return rate.peak
    x = (done - rate.warmup) / max(phase.tokens - rate.warmup, 1)
    return rate.end + (rate.peak - rate.end) * (1 - math.sqrt(x))


def describe_rate(rate: LearningRate) -> str:
    warmup = f"0 to {rate.peak:g} over {rate.warmup:,} tokens, then " if rate.warmup else ""
    return warmup + (f"{rate.peak:g} constant" if rate.shape == "constant" else f"{rate.peak:g} to {rate.end:g} 1-sqrt")


def _planned(phase: Phase, done_steps: int, steps: int, tokens_per_step: int) -> PlannedPhase:
    return PlannedPhase(
        name=phase.name,
        objective=phase.objective,
        mask_rate=phase.mask_rate,
        whole_word_masking=phase.whole_word_masking,
        learning_rate=phase.learning_rate,
        first_step=done_steps + 1,
        steps=steps,
        start=done_steps * tokens_per_step,
        tokens=steps * tokens_per_step,
    )
