"""Read a run directory: its plan and its records, by phases and tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_detour.errors import DetourError
from megatron_detour.objectives import KINDS, Objective
from megatron_detour.observe.run_files import read_environment, read_plan
from megatron_detour.observe.sinks import Record
from megatron_detour.observe.steps import StepReader, Steps


@dataclass(frozen=True)
class ValidationFigure:
    """A validation figure: title, unit and format."""

    objective: str
    title: str
    unit: str = ""
    share: bool = False  # a fraction, shown in percent

    @property
    def axis(self) -> str:
        return f"{self.title} ({self.unit})" if self.unit else self.title

    def value(self, number: float) -> str:
        return f"{number:.1%}" if self.share else f"{number:.3f}"

    def change(self, number: float) -> str:
        text = f"{100 * number:+.1f} points" if self.share else f"{number:+.3f}"
        return text.replace("-", "\u2212")


def _figures(kind: type[Objective]) -> dict[str, ValidationFigure]:
    """Return the validation figures by their keys in records."""
    name, label = kind.name, kind.label
    accuracy = {f"val_{name}_accuracy": ValidationFigure(name, f"{label} accuracy", share=True)}
    return {
        f"val_{name}_loss": ValidationFigure(name, f"{label} loss", "nats per token"),
        **(accuracy if kind.accuracy else {}),
        f"val_{name}_bits_per_byte": ValidationFigure(name, f"{label} bits per byte"),
    }


VALIDATION_FIGURES = {key: figure for kind in KINDS.values() for key, figure in _figures(kind).items()}


@dataclass(frozen=True)
class Boundary:
    """A point where validation figures are reported: before step 1, a phase's end, or the latest validation."""

    title: str
    record: Record
    ends_phase: bool


@dataclass
class Run:
    """A run: `steps` are trained steps, `validations` records with val_* figures, `guarded` those of guard actions.

    Every step has a token count: from its record, or else from the plan.
    """

    folder: Path
    name: str
    plan: dict[str, Any]
    run_file: str
    environment: dict[str, Any]
    steps: Steps
    validations: list[Record]
    guarded: list[Record]

    @property
    def phases(self) -> list[dict[str, Any]]:
        return self.plan["phases"]

    @property
    def sessions(self) -> list[dict[str, Any]]:
        return self.environment.get("sessions") or []

    @property
    def done_steps(self) -> int:
        return int(self.steps.numbers[-1]) if len(self.steps) else 0

    @property
    def done_tokens(self) -> int:
        return self.tokens_at(self.done_steps)

    @property
    def finished(self) -> bool:
        return self.done_steps >= self.plan["total_steps"]

    @property
    def started_phases(self) -> list[dict[str, Any]]:
        return [phase for phase in self.phases if phase["first_step"] <= self.done_steps]

    @property
    def resumptions(self) -> list[int]:
        """The steps after which a later session resumed."""
        steps = [session["step"] for session in self.sessions[1:]]
        return [step for step in steps if 0 < step <= self.done_steps]

    @property
    def skipped(self) -> list[Record]:
        """The records of steps whose update was skipped."""
        return [record for record in self.guarded if record.get("skipped")]

    @cached_property
    def validation_corpora(self) -> list[str]:
        """The names of the validation corpora with separate figures, in order."""
        keys = (key.partition("/") for record in self.validations for key in record)
        return list(dict.fromkeys(name for key, _, name in keys if name and key in VALIDATION_FIGURES))

    def tokens_at(self, step: int) -> int:
        """Return the tokens consumed after `step`."""
        at = int(np.searchsorted(self.steps.numbers, step))
        if at < len(self.steps) and self.steps.numbers[at] == step:
            return int(self.steps["tokens"][at])
        return _planned_tokens(self.phases, step)

    def tokens_of_steps(self) -> np.ndarray:
        """Return the number of tokens of each step."""
        numbers, tokens = self.steps.numbers, self.steps["tokens"]
        before = np.append(self.tokens_at(int(numbers[0]) - 1), tokens[:-1]) if len(numbers) else tokens
        for gap in np.flatnonzero(np.diff(numbers) > 1) + 1:
            before[gap] = self.tokens_at(int(numbers[gap]) - 1)
        return tokens - before

    def boundaries(self) -> list[Boundary]:
        """Return the validations before the first step and at the end of each phase, and the latest."""
        ends = {phase["first_step"] + phase["steps"] - 1: str(phase["name"]) for phase in self.phases}
        boundaries = []
        for record in self.validations:
            step = record["step"]
            if step == 0:
                boundaries.append(Boundary("before", record, ends_phase=True))
            elif step in ends:
                boundaries.append(Boundary(f"after {ends[step]}", record, ends_phase=True))
            elif record is self.validations[-1]:
                boundaries.append(Boundary(f"at step {step:,}", record, ends_phase=False))
        return boundaries


def read_run(run_folder: Path) -> Run:
    """Read a run directory. Raises DetourError for missing or invalid files."""
    plan, environment = read_plan(run_folder / "plan.json"), read_environment(run_folder / "environment.json")
    try:
        run_file = (run_folder / "run.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        cause = getattr(error, "strerror", None) or "not UTF-8"
        raise DetourError(f"{run_folder / 'run.yaml'}: cannot read ({cause}); restore the file") from None
    reader = StepReader(run_folder / "metrics.jsonl", tuple(VALIDATION_FIGURES))
    return Run(
        folder=run_folder,
        name=str(plan.get("name") or run_folder.name),
        plan=plan,
        run_file=run_file,
        environment=environment,
        steps=_with_tokens(reader.steps(), plan["phases"]),
        validations=reader.validations(),
        guarded=reader.guarded(),
    )


def _with_tokens(steps: Steps, phases: list[dict[str, Any]]) -> Steps:
    tokens = steps["tokens"]
    for row in np.flatnonzero(np.isnan(tokens)):
        tokens[row] = _planned_tokens(phases, int(steps.numbers[row]))
    return steps.replaced("tokens", tokens)


def _planned_tokens(phases: list[dict[str, Any]], step: int) -> int:
    for phase in reversed(phases):
        if step >= phase["first_step"]:
            share = min(1.0, (step - phase["first_step"] + 1) / max(phase["steps"], 1))
            return phase["start_tokens"] + round(share * phase["tokens"])
    return 0


def validation_points(run: Run, key: str) -> tuple[list[float], list[float]]:
    """Return the trained tokens and the value of each validation that has the figure."""
    held = [record for record in run.validations if key in record]
    return [run.tokens_at(record["step"]) for record in held], [record[key] for record in held]


@dataclass(frozen=True)
class ValidationRow:
    """A validation figure, over all corpora or for one, in several records; None where it was not measured."""

    key: str
    corpus: str
    values: list[float | None]

    @property
    def figure(self) -> ValidationFigure:
        return VALIDATION_FIGURES[self.key]

    @property
    def title(self) -> str:
        return f"{self.figure.title}, {self.corpus}" if self.corpus else self.figure.title

    def texts(self, absent: str) -> list[str]:
        return [absent if value is None else self.figure.value(value) for value in self.values]


def validation_rows(records: list[Record]) -> list[ValidationRow]:
    """Return a row per figure of any record, in the order of VALIDATION_FIGURES, all corpora before single ones."""
    order = list(VALIDATION_FIGURES)
    names = {tuple(key.split("/", 1)) if "/" in key else (key, ""): key for record in records for key in record}
    known = sorted((name for name in names if name[0] in order), key=lambda name: (order.index(name[0]), name[1] != ""))
    rows = [ValidationRow(*name, [record.get(names[name]) for record in records]) for name in known]
    return [row for row in rows if any(value is not None for value in row.values)]


def stretches(run: Run) -> list[tuple[str, Steps]]:
    """Yield the steps of each started phase, with its objective."""
    return [
        (phase["objective"], run.steps.between(phase["first_step"], phase["first_step"] + phase["steps"] - 1))
        for phase in run.started_phases
    ]
