"""All figures of an evaluation, as in summary.json, tables, plot and terminal output. Scores are fractions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_detour.evaluation.report.load_results import (
    Evaluation,
    Predictions,
    TaskFacts,
    read_evaluation,
    read_predictions,
)
from megatron_detour.evaluation.report.random_baseline import random_baseline
from megatron_detour.evaluation.report.statistics import (
    LEVEL,
    Spread,
    greater_p,
    holm,
    over_tasks,
    paired_bootstrap,
    permutation_test,
    tally,
)
from megatron_detour.evaluation.report.verdict import verdict
from megatron_detour.evaluation.results import Cell
from megatron_detour.evaluation.task_types import METRICS

SUMMARY_FORMAT = 3
PERMUTATIONS = 10_000
RESAMPLES = 10_000
MOST_NAMED = 6  # missing cells named in a note; summary.json lists all
FEW_TASKS = 6


def summarize(output: Path, baseline: str | None = None, permutations: int = PERMUTATIONS) -> dict[str, Any]:
    """Return the content of summary.json. Raises DetourError if results are not comparable (load_results.py)."""
    evaluation = read_evaluation(output, baseline)
    notes = Notes()
    tasks = [_task(evaluation, task, permutations, notes) for task in evaluation.tasks]
    differences = [each for task in tasks for each in task["differences"].values()]
    comparisons = sum(each["p_greater"] is not None for each in differences)
    # The verdict reports single tasks and means over tasks: the two families share the error rate.
    families = 1 + bool(comparisons and sum(bool(task["differences"]) for task in tasks) > 1)
    _add_holm(differences, "p_greater", families)
    _add_holm([task["best"] for task in tasks if task["best"]], "p")
    if families * comparisons / (permutations + 1) >= LEVEL:
        notes.add(f"{permutations:,} permutations are too few for {comparisons:,} comparisons to be significant")
    against = [_against(evaluation, tasks, model, families) for model in evaluation.models[1:]]
    _add_holm([each["by_tasks"] for each in against if each["by_tasks"]], "p", families)
    summary = {
        "format": SUMMARY_FORMAT,
        "protocol": evaluation.protocol,
        "models": list(evaluation.models),
        "baseline": evaluation.baseline,
        "seeds": list(evaluation.seeds),
        "permutations": permutations,
        "resamples": RESAMPLES,
        "comparisons": comparisons,
        "families": families,
        "tasks": tasks,
        "average": _average(evaluation, notes),
        "against_baseline": against,
        "cost": [_cost(evaluation, m) for m in dict.fromkeys([*evaluation.models, *evaluation.shuffled_models])],
        "machines": sorted({str(result["device"]) for result in _all(evaluation) if result.get("device")}),
        "versions": _versions(evaluation, notes),
        "notes": notes.sentences(evaluation),
    }
    return {"verdict": verdict(summary)} | summary


class Notes:
    """Notes on missing and uncertain figures, one sentence each."""

    def __init__(self) -> None:
        self._sentences: list[str] = []
        self._without_predictions: dict[str, list[str]] = {}

    def add(self, sentence: str) -> None:
        self._sentences.append(sentence)

    def no_predictions(self, task: TaskFacts, models: tuple[str, str]) -> None:
        self._without_predictions.setdefault(task.name, []).append(" and ".join(models))

    def sentences(self, evaluation: Evaluation) -> list[str]:
        notes = list(self._sentences)
        for name, pairs in self._without_predictions.items():
            notes.append(f"no permutation test on {name}: predictions are missing ({'; '.join(pairs)})")
        if len(evaluation.seeds) == 1:
            notes.append("with one seed the variance over seeds is unknown, so no difference counts as clear")
        elif 1 < len(evaluation.seeds) < 5:
            notes.append(f"{len(evaluation.seeds)} seeds: the intervals over seeds are wide and approximate")
        if 0 < len(evaluation.tasks) < FEW_TASKS and len(evaluation.models) > 1:
            few = f"{len(evaluation.tasks)} tasks" if len(evaluation.tasks) > 1 else "1 task"
            notes.append(f"{few}: an interval over so few is wide, and valid only if the differences are normal")
        return notes


def _all(evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    return itertools.chain(evaluation.trained.values(), evaluation.shuffled.values())


# ------------------------------------------------------------------------------------------------ one task


def _task(evaluation: Evaluation, task: TaskFacts, permutations: int, notes: Notes) -> dict[str, Any]:
    """Return the figures of a task; its predictions are released afterwards."""
    scores = {model: evaluation.scores(model, task.name) for model in evaluation.models}
    spreads = {model: Spread.from_values(list(own.values())) for model, own in scores.items() if own}
    cells = [Cell(model, task.name, seed) for model, own in scores.items() for seed in own]
    shuffled = [cell for cell in evaluation.shuffled if cell.task == task.name]
    predictions = read_predictions(evaluation.output, task.metric, [*cells, *shuffled])
    pairs = Pairs(task, scores, predictions, permutations, notes)
    compared = [model for model in evaluation.models[1:] if pairs.seeds(model, evaluation.baseline)]
    ranked = sorted(spreads, key=lambda model: -spreads[model].mean)
    return {
        **asdict(task),
        "scores": {
            model: _shown(spreads[model]) | {"values": {str(seed): score for seed, score in scores[model].items()}}
            for model in spreads
        },
        "differences": {model: pairs.difference(model, evaluation.baseline) for model in compared},
        "best": _best(pairs, ranked) if len(ranked) == len(evaluation.models) > 1 else None,
        "sanity": _sanity(evaluation, task, predictions, spreads),
    }


def _shown(spread: Spread) -> dict[str, Any]:
    return {"mean": spread.mean, "sd": spread.sd, "seeds": spread.count, "interval": spread.interval()}


class Pairs:
    """Differences between models on one task, each tested once."""

    def __init__(
        self,
        task: TaskFacts,
        scores: dict[str, dict[int, float]],
        predictions: Predictions | None,
        permutations: int,
        notes: Notes,
    ) -> None:
        self._task, self._scores, self._predictions = task, scores, predictions
        self._permutations, self._notes = permutations, notes
        self._differences: dict[tuple[str, str], dict[str, Any]] = {}
        self._contributions: dict[Cell, np.ndarray] = {}

    def seeds(self, model: str, other: str) -> list[int]:
        """Return the seeds that both models have."""
        return [seed for seed in self._scores[model] if seed in self._scores[other]]

    def difference(self, model: str, other: str) -> dict[str, Any]:
        """Return how much better `model` is on common seeds: mean, interval and p over seeds, p of the permutation
        test, and the greater of the two p, which decides."""
        if (other, model) in self._differences:
            back = self._differences[other, model]
            interval = back["interval"] and (-back["interval"][1], -back["interval"][0])
            return back | {"mean": -back["mean"], "interval": interval}
        if (model, other) not in self._differences:
            seeds = self.seeds(model, other)
            spread = Spread.from_values([self._scores[model][seed] - self._scores[other][seed] for seed in seeds])
            p, p_seeds = self._p(model, other, seeds), spread.p()
            p_values = {"p": p, "p_seeds": p_seeds, "p_greater": greater_p(p, p_seeds)}
            self._differences[model, other] = _shown(spread) | p_values
        return self._differences[model, other]

    def _p(self, model: str, other: str, seeds: list[int]) -> float | None:
        a, b = (self._contributions_of(name, seeds) for name in (model, other))
        if a is None or b is None:
            self._notes.no_predictions(self._task, (model, other))
            return None
        return permutation_test(a, b, METRICS[self._task.metric].from_totals, self._permutations).p

    def _contributions_of(self, model: str, seeds: list[int]) -> np.ndarray | None:
        """Return each test example's contribution to the score [seeds, n, k]; None if predictions are missing."""
        predictions, cells = self._predictions, [Cell(model, self._task.name, seed) for seed in seeds]
        if predictions is None or any(cell not in predictions.predicted for cell in cells):
            return None
        for cell in cells:
            if cell not in self._contributions:
                self._contributions[cell] = predictions.contributions(self._task.metric, cell)
        return np.stack([self._contributions[cell] for cell in cells])


def _best(pairs: Pairs, ranked: list[str]) -> dict[str, Any] | None:
    """Return the model with the best mean; `p` is the greatest of its comparisons with the other models."""
    best, *others = ranked
    if not all(pairs.seeds(best, other) for other in others):
        return None
    p_values = [pairs.difference(best, other)["p_greater"] for other in others]
    return {"model": best, "p": None if None in p_values else max(p_values)}


def _add_holm(comparisons: list[dict[str, Any]], key: str, families: int = 1) -> None:
    """Add `p_holm` and `clear` from the p under `key`; entries without p are not comparisons."""
    tested = [each for each in comparisons if each[key] is not None]
    for each in comparisons:
        each |= {"p_holm": None, "clear": False}
    for each, p in zip(tested, holm((each[key] for each in tested), families), strict=True):
        each |= {"p_holm": p, "clear": p < LEVEL}


def _sanity(
    evaluation: Evaluation, task: TaskFacts, predictions: Predictions | None, spreads: dict[str, Spread]
) -> dict[str, Any]:
    """Return the random baseline (None if unknown), scores of shuffled labels, and models not above the baseline."""
    baseline = random_baseline(METRICS[task.metric], predictions.labels, predictions.gold) if predictions else None
    shuffled = {}
    for model in evaluation.shuffled_models:
        if own := evaluation.scores(model, task.name, shuffled=True):
            spread = Spread.from_values(list(own.values()))
            shuffled[model] = _shown(spread) | {"at_chance": baseline and spread.mean <= baseline.high}
    return {
        "chance": asdict(baseline) if baseline else None,
        "shuffled": shuffled,
        "not_above": [model for model, spread in spreads.items() if baseline and spread.mean <= baseline.high],
    }


# ------------------------------------------------------------------------------------------------ over all tasks


def _average(evaluation: Evaluation, notes: Notes) -> dict[str, Any]:
    """Return the mean over the tasks that all models have finished, by seed; note the missing cells."""
    matrices = {model: evaluation.matrix(model) for model in evaluation.models}
    complete = np.all([~np.isnan(matrix).any(1) for matrix in matrices.values()], axis=0)
    complete &= bool(evaluation.seeds)
    missing = [
        str(Cell(model, task.name, seed))
        for model, matrix in matrices.items()
        for row, task in enumerate(evaluation.tasks)
        for column, seed in enumerate(evaluation.seeds)
        if np.isnan(matrix[row, column])
    ]
    if missing:
        left = [task.name for task, whole in zip(evaluation.tasks, complete, strict=True) if not whole]
        named = f" ({'; '.join(missing)})" if len(missing) <= MOST_NAMED else ""
        are = "cell is" if len(missing) == 1 else "cells are"
        notes.add(f"{len(missing):,} {are} missing{named}; the average excludes {', '.join(left)}")
    return {
        "tasks": [task.name for task, whole in zip(evaluation.tasks, complete, strict=True) if whole],
        "scores": {model: _shown(Spread.from_values(matrix[complete].mean(0))) for model, matrix in matrices.items()}
        if complete.any()
        else {},
        "missing": missing,
    }


def _against(evaluation: Evaluation, tasks: list[dict[str, Any]], model: str, families: int) -> dict[str, Any]:
    """Compare a model with the baseline over their common cells; None without common cells."""
    own, other = evaluation.matrix(model), evaluation.matrix(evaluation.baseline)
    common = bool((~np.isnan(own - other)).any())
    differences = [task["differences"][model] for task in tasks if model in task["differences"]]
    return {
        "model": model,
        "cells": asdict(paired_bootstrap(own, other, RESAMPLES)) if common else None,
        "by_tasks": asdict(over_tasks(own, other)) if common else None,
        "least": _least(own - other, families * (len(evaluation.models) - 1)) if common else None,
        "tally": asdict(tally([each["mean"] for each in differences], [each["clear"] for each in differences])),
        "tested": sum(each["p_greater"] is not None for each in differences),
    }


def _least(difference: np.ndarray, comparisons: int) -> float | None:
    """Return the smallest mean difference that these tasks, or the seeds of a single task, could show; None if none."""
    kept = difference[~np.isnan(difference).all(1)]
    values = np.nanmean(kept, axis=1) if len(kept) > 1 else kept[~np.isnan(kept)]
    return Spread.from_values(list(values)).half(comparisons)


def _cost(evaluation: Evaluation, model: str) -> dict[str, Any]:
    """Return the time of a model's fine-tunings; those with shuffled labels are listed separately."""
    seconds = [result["seconds"] for cell, result in evaluation.trained.items() if cell.model == model]
    shuffled = [result["seconds"] for cell, result in evaluation.shuffled.items() if cell.model == model]
    return {
        "model": model,
        "runs": len(seconds),
        "seconds": sum(seconds),
        "shuffled_runs": len(shuffled),
        "shuffled_seconds": sum(shuffled),
    }


def _versions(evaluation: Evaluation, notes: Notes) -> dict[str, str]:
    """Return the library versions, several per package if it changed between results."""
    by_package: dict[str, dict[str, None]] = {}
    for result in _all(evaluation):
        for package, version in (result.get("versions") or {}).items():
            by_package.setdefault(package, {})[str(version)] = None
    for package, versions in by_package.items():
        if len(versions) > 1:
            notes.add(f"results come from several versions of {package}: {', '.join(versions)}")
    return {package: ", ".join(versions) for package, versions in by_package.items()}
