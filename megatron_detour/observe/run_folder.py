"""What the folder of a run says: its plan and its records, by phases and tokens, and how its numbers read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_detour.errors import DetourError
from megatron_detour.observe.sinks import Record, read_metrics

SHAPES = {"linear": "a straight line", "cosine": "a cosine", "sqrt": "a square root", "1-sqrt": "one minus square root"}
VALIDATION_FIGURES = {
    "val_mlm_loss": "MLM loss",
    "val_mlm_accuracy": "MLM accuracy",
    "val_clm_loss": "CLM loss",
}


@dataclass
class Run:
    """What a run's folder says. `records` hold the trained steps, `validations` those with val_* figures."""

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
    def done_steps(self) -> int:
        return self.records[-1]["step"] if self.records else 0

    @property
    def done_tokens(self) -> int:
        return self.tokens_at(self.done_steps)

    @property
    def started_phases(self) -> list[dict[str, Any]]:
        return [phase for phase in self.phases if phase["first_step"] <= self.done_steps]

    @property
    def resumptions(self) -> list[int]:
        """The steps after which a later session went on."""
        steps = [session["step"] for session in self.environment.get("sessions", [])[1:]]
        return [step for step in steps if 0 < step <= self.done_steps]

    def tokens_at(self, step: int) -> int:
        return step * self.plan["tokens_per_step"]


def read_run(run_folder: Path) -> Run:
    """Returns what the files of a run's folder say. Raises DetourError where the run file or the plan is missing."""
    plan = _read_json(run_folder / "plan.json")
    environment_file = run_folder / "environment.json"
    metrics_file = run_folder / "metrics.jsonl"
    # A step that was written twice counts once, as it ran last.
    by_step = {record["step"]: record for record in (read_metrics(metrics_file) if metrics_file.exists() else [])}
    records = [by_step[step] for step in sorted(by_step)]
    return Run(
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
        return json.loads(_read_text(path))
    except ValueError as error:
        raise DetourError(f"{path} is not valid JSON ({error}); restore the file or start the run anew") from error


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


def objective_words(phase: dict[str, Any]) -> str:
    """Returns e.g. ``MLM, 30% masked`` or ``CLM``."""
    objective = phase["objective"].upper()
    return objective if phase.get("mask_rate") is None else f"{objective}, {100 * phase['mask_rate']:.3g}% masked"


def rate_words(rate: dict[str, Any]) -> str:
    """Describes the learning rate of a phase: its warm-up, its peak and its end."""
    peak, end, shape = rate["peak"], rate.get("end"), str(rate.get("shape") or "constant")
    warmup = rate.get("warmup_tokens") or 0
    words = f"rises to {peak:.3g} over {compact(warmup)} tokens" if warmup else f"starts at {peak:.3g}"
    if shape == "constant" or end is None or end == peak:
        return f"{words}, then stays"
    return f"{words}, then follows {SHAPES.get(shape, shape)} to {end:.3g}"


def compact(number: float) -> str:
    """Returns a count in three significant digits: ``950``, ``12.3k``, ``1.5M``, ``2B``, ``1.2T``."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        # 999,999 rounds up to 1M, not to 1000k
        if float(f"{abs(number):.3g}") >= size:
            return f"{_three_digits(number / size)}{letter}"
    return _three_digits(number)


def _three_digits(number: float) -> str:
    whole = len(str(int(abs(number))))
    text = f"{number:.{max(0, 3 - whole)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def byte_size(count: float) -> str:
    """Returns a size in binary units: ``512 B``, ``3.4 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{_three_digits(count)} {unit}"
        count /= 1024
    return f"{_three_digits(count)} TiB"
