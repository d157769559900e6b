"""The schedule as a pure function of tokens: the run file and the tokens consumed determine each step.

Resuming needs no saved state of it.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_detour.config import AUTO, Corpus, LearningRate, Phase, RunConfig
from megatron_detour.objectives import Objective


@dataclass(frozen=True)
class BatchStage:
    """Consecutive steps of one batch size. `start` counts tokens from the start of the run."""

    first_step: int  # 1-based
    steps: int
    sequences: int  # per step
    start: int
    tokens: int


@dataclass(frozen=True)
class PlannedPhase:
    """A phase rounded up to whole steps, with defaults taken from the run."""

    settings: Phase
    sequence_length: int
    sequences: int  # per step, after the batch warm-up
    micro_sequences: int | None  # None: auto, which Plan.with_micro_sequences replaces
    corpora: tuple[Corpus, ...]
    stages: tuple[BatchStage, ...]

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def objective(self) -> Objective:
        return self.settings.objective

    @property
    def learning_rate(self) -> LearningRate:
        return self.settings.learning_rate

    @property
    def first_step(self) -> int:
        return self.stages[0].first_step

    @cached_property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def last_step(self) -> int:
        return self.first_step + self.steps - 1

    @property
    def start(self) -> int:
        """Tokens of the run before the phase."""
        return self.stages[0].start

    @cached_property
    def tokens(self) -> int:
        return sum(stage.tokens for stage in self.stages)

    @property
    def end(self) -> int:
        """Tokens of the run once the phase is done."""
        return self.start + self.tokens


@dataclass(frozen=True)
class Step:
    """One optimizer step; `start` and `tokens` are the tokens consumed before and after it."""

    number: int  # 1-based
    phase: PlannedPhase
    learning_rate: float
    objective: Objective  # as at this step
    sequences: int
    start: int
    tokens: int

    @property
    def begins_phase(self) -> bool:
        return self.start == self.phase.start

    @property
    def ends_phase(self) -> bool:
        return self.tokens == self.phase.end

    def passes(self, every: int | None) -> bool:
        """Whether this step carries the run over a multiple of `every` tokens."""
        return every is not None and self.tokens // every > self.start // every


@dataclass(frozen=True)
class Plan:
    name: str
    phases: tuple[PlannedPhase, ...]

    @classmethod
    def from_config(cls, config: RunConfig) -> Plan:
        phases: list[PlannedPhase] = []
        for phase in config.phases:
            phases.append(_planned(phase, config, phases[-1] if phases else None))
        return cls(config.name, tuple(phases))

    @property
    def total_steps(self) -> int:
        return self.phases[-1].last_step

    @property
    def total_tokens(self) -> int:
        return self.phases[-1].end

    @property
    def micro_batches(self) -> list[tuple[int, int, bool]]:
        """The sequence length, sequences of a micro-batch and directions of attention of each phase."""
        return [
            (phase.sequence_length, phase.micro_sequences, part.causal)
            for phase in self.phases
            for _, part in phase.objective.parts()
        ]

    def with_micro_sequences(self, chosen: dict[str, int]) -> Plan:
        """Return the plan with these sequences per micro-batch, by phase. They do not affect the schedule."""
        phases = (dataclasses.replace(phase, micro_sequences=chosen[phase.name]) for phase in self.phases)
        return dataclasses.replace(self, phases=tuple(phases))

    @property
    def has_detour(self) -> bool:
        """Whether a control differs from the run."""
        return any(phase.objective.detour for phase in self.phases)

    @cached_property
    def _stages(self) -> list[tuple[BatchStage, PlannedPhase]]:
        return [(stage, phase) for phase in self.phases for stage in phase.stages]

    @cached_property
    def _starts(self) -> list[int]:
        return [stage.start for stage, _ in self._stages]

    def at(self, tokens: int) -> Step:
        """Return the step that begins after `tokens` tokens. Raise ValueError outside the run or inside a step."""
        if not 0 <= tokens < self.total_tokens:
            raise ValueError(f"no step begins at {tokens} tokens")
        stage, phase = self._stages[bisect_right(self._starts, tokens) - 1]
        size = stage.sequences * phase.sequence_length
        before, inside = divmod(tokens - stage.start, size)
        if inside:
            raise ValueError(f"no step begins at {tokens} tokens")
        done = tokens + size - phase.start
        return Step(
            number=stage.first_step + before,
            phase=phase,
            learning_rate=learning_rate(phase, done),
            objective=phase.objective.at(done, phase.tokens),
            sequences=stage.sequences,
            start=tokens,
            tokens=tokens + size,
        )

    def step(self, number: int) -> Step:
        """Return the step with this number, from 1 to total_steps. Raise ValueError for other numbers."""
        if not 1 <= number <= self.total_steps:
            raise ValueError(f"there is no step {number}")
        stage, phase = next(pair for pair in reversed(self._stages) if pair[0].first_step <= number)
        size = stage.sequences * phase.sequence_length
        return self.at(stage.start + (number - stage.first_step) * size)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "total_steps": self.total_steps,
            "total_tokens": self.total_tokens,
            "phases": [_phase_to_dict(phase) for phase in self.phases],
        }


def learning_rate(phase: PlannedPhase, done: int) -> float:
    """Return the learning rate of the step that brings the phase to `done` tokens.

    The first step's is above zero, the last one's is the end. x is the fraction of the phase after its warm-up that is
    done; 1-sqrt is ModernBERT's decay.
    """
    rate = phase.learning_rate
    if done < rate.warmup:
        return rate.peak * done / rate.warmup
    x = (done - rate.warmup) / max(phase.tokens - rate.warmup, 1)
    decay = {
        "constant": 1.0,
        "linear": 1 - x,
        "cosine": (1 + math.cos(math.pi * x)) / 2,
        "1-sqrt": 1 - math.sqrt(x),
    }[rate.shape]
    return rate.last + (rate.peak - rate.last) * decay


def _planned(phase: Phase, config: RunConfig, before: PlannedPhase | None) -> PlannedPhase:
    length = phase.sequence_length or config.data.sequence_length
    sequences = phase.sequences or config.batch.sequences
    micro = phase.micro_sequences or config.batch.micro_sequences
    stages: list[BatchStage] = []
    step, start = (before.last_step + 1, before.end) if before else (1, 0)
    done = 0
    for size, until in _batch_sizes(phase, sequences):
        steps = math.ceil((until - done) / (size * length))
        if steps > 0:
            tokens = steps * size * length
            stages.append(BatchStage(step, steps, size, start + done, tokens))
            step, done = step + steps, done + tokens
    return PlannedPhase(
        settings=phase,
        sequence_length=length,
        sequences=sequences,
        micro_sequences=None if micro == AUTO else micro,
        corpora=phase.corpora or config.data.corpora,
        stages=tuple(stages),
    )


def _batch_sizes(phase: Phase, sequences: int) -> list[tuple[int, int]]:
    """Return batch sizes, each with the tokens of the phase at which it ends."""
    warmup = phase.batch_warmup
    if warmup is None:
        return [(sequences, phase.tokens)]
    sizes = range(warmup.start, sequences, warmup.increment)
    ends = [math.ceil(warmup.tokens * (i + 1) / len(sizes)) for i in range(len(sizes))]
    return [*zip(sizes, ends, strict=True), (sequences, phase.tokens)]


def _phase_to_dict(phase: PlannedPhase) -> dict[str, Any]:
    settings, rate, warmup = phase.settings, phase.learning_rate, phase.settings.batch_warmup
    return {
        "name": phase.name,
        **phase.objective.to_dict(),
        "freeze": list(settings.freeze),
        "optimizer_state": settings.optimizer_state,
        "first_step": phase.first_step,
        "steps": phase.steps,
        "tokens": phase.tokens,
        "start_tokens": phase.start,
        "end_tokens": phase.end,
        "sequence_length": phase.sequence_length,
        "sequences": phase.sequences,
        "batch_warmup": warmup and {"from": warmup.start, "increment": warmup.increment, "tokens": warmup.tokens},
        "corpora": [dataclasses.asdict(corpus) for corpus in phase.corpora],
        "learning_rate": {
            "peak": rate.peak,
            "warmup_tokens": rate.warmup,
            "shape": rate.shape,
            "end": None if rate.shape == "constant" else rate.last,
        },
    }
