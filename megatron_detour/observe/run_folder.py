"""What the folder of a run says: its plan and its records, by phases and tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_detour.errors import DetourError
from megatron_detour.observe.sinks import Record, read_metrics


@dataclass(frozen=True)
class ValidationFigure:
    """A validation figure: its title and how it is written."""

    title: str
    share: bool = False  # of one: written in percent

    @property
    def objective(self) -> str:
        return "clm" if self.title.startswith("CLM") else "mlm"

    def value(self, number: float) -> str:
        return f"{number:.1%}" if self.share else f"{number:.3f}"

    def change(self, number: float) -> str:
        text = f"{100 * number:+.1f} points" if self.share else f"{number:+.3f}"
        return text.replace("-", "\u2212")


VALIDATION_FIGURES = {
    "val_mlm_loss": ValidationFigure("MLM loss"),
    "val_mlm_accuracy": ValidationFigure("MLM accuracy", share=True),
    "val_mlm_bits_per_byte": ValidationFigure("MLM bits per byte"),
    "val_clm_loss": ValidationFigure("CLM loss"),
    "val_clm_bits_per_byte": ValidationFigure("CLM bits per byte"),
}


@dataclass(frozen=True)
class Boundary:
    """Where the figures of a run are told: before the first step, at the end of a phase or at its latest validation."""

    title: str
    record: Record
    ends_phase: bool


@dataclass
class Run:
    """What a run's folder says. `records` hold the trained steps, `validations` those with val_* figures."""

    folder: Path
    name: str
    plan: dict[str, Any]
    run_file: str
    environment: dict[str, Any]
    records: list[Record]
    validations: list[Record]

    @property
    def phases(self) -> list[dict[str, Any]]:
        return self.plan["phases"]

    @property
    def sessions(self) -> list[dict[str, Any]]:
        return self.environment.get("sessions") or []

    @property
    def done_steps(self) -> int:
        return self.records[-1]["step"] if self.records else 0

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
        """The steps after which a later session went on."""
        steps = [session["step"] for session in self.sessions[1:]]
        return [step for step in steps if 0 < step <= self.done_steps]

    @property
    def skipped(self) -> list[Record]:
        """The steps whose update was left out."""
        return [record for record in self.records if record.get("skipped")]

    @property
    def guarded(self) -> list[Record]:
        """The steps at which a guard spoke: the skipped ones and the spikes that were only reported."""
        return [record for record in self.records if record.get("skipped") or record.get("spike")]

    @cached_property
    def validation_corpora(self) -> list[str]:
        """The names of the validation corpora that have figures of their own, in their order."""
        keys = (key.partition("/") for record in self.validations for key in record)
        return list(dict.fromkeys(name for key, _, name in keys if name and key in VALIDATION_FIGURES))

    @cached_property
    def _tokens(self) -> dict[int, int]:
        return {record["step"]: record["tokens"] for record in self.records if record.get("tokens") is not None}

    def tokens_at(self, step: int) -> int:
        """The tokens consumed once `step` is done: as its record says, or else as its phase suggests."""
        if step in self._tokens:
            return self._tokens[step]
        for phase in reversed(self.phases):
            if step >= phase["first_step"]:
                share = min(1.0, (step - phase["first_step"] + 1) / max(phase["steps"], 1))
                return phase["start_tokens"] + round(share * phase["tokens"])
        return 0

    def boundaries(self) -> list[Boundary]:
        """The validations before the first step and at the end of each phase, and the latest where it is another."""
        ends = {phase["first_step"] + phase["steps"] - 1: str(phase["name"]) for phase in self.phases}
        found = []
        for record in self.validations:
            step = record["step"]
            if step == 0:
                found.append(Boundary("before", record, ends_phase=True))
            elif step in ends:
                found.append(Boundary(f"after {ends[step]}", record, ends_phase=True))
            elif record is self.validations[-1]:
                found.append(Boundary(f"at step {step:,}", record, ends_phase=False))
        return found


def read_run(run_folder: Path) -> Run:
    """Returns what the files of a run's folder say. Raises DetourError where the run file or the plan is missing."""
    plan = _read_json(run_folder / "plan.json")
    environment_file = run_folder / "environment.json"
    metrics_file = run_folder / "metrics.jsonl"
    if not isinstance(plan.get("phases"), list) or "total_steps" not in plan:
        raise DetourError(f"{run_folder / 'plan.json'} holds no plan; restore the file or start the run anew")
    # A step that was written twice counts once, as it ran last.
    by_step = {record["step"]: record for record in (read_metrics(metrics_file) if metrics_file.exists() else [])}
    records = [by_step[step] for step in sorted(by_step)]
    return Run(
        folder=run_folder,
        name=str(plan.get("name") or run_folder.name),
        plan=plan,
        run_file=_read_text(run_folder / "run.yaml"),
        environment=_read_json(environment_file) if environment_file.exists() else {},
        records=[record for record in records if record["step"] > 0],
        validations=[record for record in records if any(record.get(key) is not None for key in VALIDATION_FIGURES)],
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DetourError(f"{path} cannot be read ({error.strerror}); is this the folder of a run?") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(path))
    except ValueError as error:
        raise DetourError(f"{path} is not valid JSON ({error}); restore the file or start the run anew") from error
    if not isinstance(content, dict):
        raise DetourError(f"{path} holds no JSON object; restore the file or start the run anew")
    return content


def points(run: Run, records: list[Record], key: str) -> tuple[list[float], list[float]]:
    """The tokens trained and the figure of each of the records that has this figure."""
    chosen = [record for record in records if record.get(key) is not None]
    return [run.tokens_at(record["step"]) for record in chosen], [record[key] for record in chosen]


def stretches(run: Run) -> list[tuple[str, list[Record]]]:
    """The records of each started phase, with its objective."""
    found = []
    for phase in run.started_phases:
        first, last = phase["first_step"], phase["first_step"] + phase["steps"] - 1
        found.append((phase["objective"], [record for record in run.records if first <= record["step"] <= last]))
    return found
