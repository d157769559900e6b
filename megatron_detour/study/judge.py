"""The verdicts of a study's criteria, from its result lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_detour.analysis.drift import regions_of
from megatron_detour.errors import DetourError
from megatron_detour.settings import read
from megatron_detour.study.criteria import LOSS, MEAN, OTHER, Criterion, Quantity
from megatron_detour.study.jobs import write_lines
from megatron_detour.study.records import REGISTRATION, RESULTS, START
from megatron_detour.study.registration import registered
from megatron_detour.study.results import Line, read_lines
from megatron_detour.study.schema import StudyConfig
from megatron_detour.study.statistics import Comparison, compare, compare_values, verdicts

NO_TEST = 0.05  # the level of intervals of a criterion without a test


def write_verdicts(folder: Path) -> None:
    """Judge the results of a study's folder by its registered criteria, and write the verdicts beside them."""
    registration = registered(folder)
    config = read(StudyConfig, registration["study"] | {"folder": str(folder)}, str(folder / REGISTRATION))
    lines = [line for line in read_lines(folder) if line["kind"] != "verdict"]
    seeds = registration["facts"].get("finetuning_seeds", [])
    write_lines(folder / RESULTS, [*lines, *judge(config, seeds, lines)])


def judge(config: StudyConfig, finetuning_seeds: Sequence[int], lines: Sequence[Line]) -> list[Line]:
    """Return a verdict line per criterion. `met` is None where the results do not suffice."""
    criteria = {name: Criterion.parse(text, config) for name, text in config.criteria.items()}
    results = Results(config, finetuning_seeds, lines)
    compared: dict[str, Comparison] = {}
    missing: dict[str, str] = {}
    for name, criterion in criteria.items():
        try:
            compared[name] = results.compare(criterion)
        except DetourError as reason:
            missing[name] = str(reason)
    tested = [name for name in compared if criteria[name].level is not None]
    directions = ["not above" if criteria[name].negated else "above" for name in tested]
    unjudged = sum(criteria[name].level is not None and not criteria[name].negated for name in missing)
    pairs = [(compared[name], direction) for name, direction in zip(tested, directions, strict=True)]
    judged = dict(zip(tested, verdicts(pairs, unjudged), strict=True))
    output = []
    for name, criterion in criteria.items():
        line: Line = {"kind": "verdict", "criterion": name, "text": criterion.text}
        if name in missing:
            line |= {"met": None, "sentence": f"not judged: {missing[name]}", "p": None}
        else:
            line |= _verdict(criterion, compared[name], judged.get(name))
        output.append(line)
    return output


def _verdict(criterion: Criterion, found: Comparison, judged: Any) -> Line:
    if judged is None:
        met, p = (found.mean > found.than) != criterion.negated, None
    else:
        met, p = judged.met, judged.p
    figures = {key: getattr(found, key) for key in ("mean", "low", "high", "at_least", "at_most", "than")}
    return {
        "met": bool(met),
        "p": p,
        **figures,
        "seeds": found.training_seeds,
        "sentence": _sentence(criterion, found, p),
    }


def _sentence(criterion: Criterion, found: Comparison, p: float | None) -> str:
    points = criterion.measure is not None and criterion.measure != LOSS

    def shown(value: float | None) -> str:
        if value is None:
            return "unknown"
        return f"{100 * value:+.2f}" if points else f"{value:+.4f}" if criterion.measure else f"{value:.3g}"

    unit = " points" if points else " nats per token" if criterion.measure == LOSS else ""
    what = f"{_name(criterion.left)} minus {_name(criterion.right)}" if criterion.measure else _name(criterion.left)
    if isinstance(criterion.right, Quantity):
        what = f"{what} over {_name(criterion.right)}"
    interval = "" if found.low is None else f" ({1 - found.level:.0%} {shown(found.low)} to {shown(found.high)})"
    corrected = "" if criterion.negated else " after Holm's correction"
    test = "" if p is None else f", one-sided p = {p:.3g}{corrected}"
    seeds = f"{found.training_seeds} training seed{'' if found.training_seeds == 1 else 's'}"
    return f"{what}: {shown(found.mean)}{unit}{interval}{test}; {seeds}"


def _name(side: str | Quantity | float) -> str:
    if isinstance(side, Quantity):
        return f"{side.name} of {side.region}" + (f" in {side.arm}" if side.arm else "")
    return str(side)


class Results:
    """Result lines by arm, task and seed."""

    def __init__(self, config: StudyConfig, finetuning_seeds: Sequence[int], lines: Sequence[Line]) -> None:
        self._config, self._seeds, self._finetuning = config, config.seeds, list(finetuning_seeds)
        self.tasks = [Path(task).stem for task in config.evaluation.tasks] if config.evaluation else []
        self._scores = {
            (line["arm"], line["task"], line["seed"], line["finetuning_seed"]): line["score"]
            for line in lines
            if line["kind"] == "score"
        }
        self._losses = {(line["arm"], line["seed"]): line["loss"] for line in lines if line["kind"] == "run"}
        self._drift = {(line["arm"], line["seed"]): line for line in lines if line["kind"] == "drift"}
        self._persistence = {line["seed"]: line for line in lines if line["kind"] == "persistence"}

    def scores(self, arm: str, tasks: Sequence[str] | None = None) -> np.ndarray:
        """Return scores [tasks, training seeds, fine-tuning seeds], NaN where missing; the start model has no seed."""

        def score(task: str, seed: int, finetuning: int) -> float:
            value = self._scores.get((arm, task, None if arm == START else seed, finetuning))
            return math.nan if value is None else value

        chosen = self.tasks if tasks is None else tasks
        return np.array([[[score(t, s, f) for f in self._finetuning] for s in self._seeds] for t in chosen])

    def compare(self, criterion: Criterion) -> Comparison:
        """Raises DetourError if the results do not suffice."""
        found = self._comparison(criterion)
        if criterion.level is not None and found.low is None and found.training_seeds == 1:
            raise DetourError(f"a single training seed, with a mean of {found.mean:.4g}, says nothing about others")
        return found

    def _comparison(self, criterion: Criterion) -> Comparison:
        level = NO_TEST if criterion.level is None else criterion.level
        left, right = criterion.left, criterion.right
        if isinstance(left, Quantity):
            return self._compare_quantities(left, right, level)
        if criterion.measure == LOSS:
            return compare_values(self._loss(left), self._loss(right), level=level)
        tasks = None if criterion.measure in (MEAN, OTHER) else [criterion.measure]
        kind = "random" if criterion.measure == OTHER else "fixed"
        a, b = self.scores(left, tasks), self.scores(right, tasks)
        found = compare(a, b, criterion.method, tasks=kind, level=level)
        if found.tasks < len(a):
            absent = len(a) - found.tasks
            raise DetourError(f"{absent} of {len(a)} tasks have no scores of both arms for a common training seed")
        return found

    def _compare_quantities(self, left: Quantity, right: Quantity | float, level: float) -> Comparison:
        ratio = left.name == "drift ratio"
        values = self._quantity(left)
        if isinstance(right, Quantity):
            return compare_values(values, self._quantity(right), log=True, level=level)
        return compare_values(values, than=right, log=ratio and right > 0, level=level)

    def _loss(self, arm: str) -> list[float]:
        return [math.nan if value is None else value for value in (self._losses.get((arm, s)) for s in self._seeds)]

    def _quantity(self, quantity: Quantity) -> list[float]:
        """Return the quantity per training seed; NaN where missing."""
        values = [self._value(quantity, seed) for seed in self._seeds]
        if all(map(math.isnan, values)):
            raise DetourError(f"no training seed has a {quantity.name}")
        return values

    def _value(self, quantity: Quantity, seed: int) -> float:
        if quantity.name == "persistence":
            line = self._persistence.get(seed)
            return math.nan if line is None else persistence(line, quantity.region)
        arm = quantity.arm or self._config.analyses.drift.of[0]
        line = self._drift.get((arm, seed))
        return math.nan if line is None else drift(line, quantity.region, quantity.name == "drift ratio")


def drift(line: Line, region: str, ratio: bool) -> float:
    """Return the mean divergence of a region's layers over draws, or its ratio to that of the noise."""
    own = _region(line["divergence"], region)
    if not ratio:
        return own
    noise = _region(line["noise"], region) if line["noise"] else 0.0
    return own / noise if noise > 0 else math.nan


def persistence(line: Line, region: str) -> float:
    """Return the divergence at the end of the phase as a share of that at its start."""
    points = sorted(line["points"])
    first, last = _region(points[0][1], region), _region(points[-1][1], region)
    return last / first if first > 0 else math.nan


def _region(rows: Sequence[Sequence[float]], region: str) -> float:
    values = np.mean(rows, axis=0)
    return float(values[regions_of(len(values))[region]].mean())
