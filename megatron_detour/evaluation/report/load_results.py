"""Load the results of an evaluation and refuse those that are not comparable (protocol, task, data, test split)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from megatron_detour.errors import DetourError, nearest
from megatron_detour.evaluation.results import RESULTS, Cell, Result, predictions_path, read_results
from megatron_detour.evaluation.task import load_task, packaged_tasks
from megatron_detour.evaluation.task_types import METRICS
from megatron_detour.structured import read_json_object

REQUIRED = ("protocol", "metric", "score", "scores", "examples", "seconds")
TASK_KEYS = ("metric", "ner_head", "examples")  # keys of a result that must agree within a task
REMEDY = "remove the file; the next evaluation recreates it"
IDENTITY_KEYS = {  # hashes, if a result has them
    "format": "result format",
    "task": "task definition",
    "data": "data",
    "protocol": "protocol",
}


@dataclass(frozen=True)
class Evaluation:
    """Results by cell: `trained` with true labels, `shuffled` with shuffled labels. The two are never mixed.

    `models` are in the order of their first result, the baseline first, without models that have only shuffled
    results, unless all have. `tasks` are sorted by language and name.
    """

    output: Path
    models: tuple[str, ...]
    tasks: tuple[TaskFacts, ...]
    trained: dict[Cell, Result]
    shuffled: dict[Cell, Result]

    @property
    def baseline(self) -> str:
        return self.models[0]

    @property
    def shuffled_models(self) -> list[str]:
        """The models with results of shuffled labels."""
        return list(dict.fromkeys(cell.model for cell in self.shuffled))

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        """All seeds of any model on any task, with true labels."""
        return tuple(sorted({cell.seed for cell in self.trained}))

    @property
    def protocol(self) -> str:
        return next(iter((self.trained or self.shuffled).values()))["protocol"]

    def scores(self, model: str, task: str, *, shuffled: bool = False) -> dict[int, float]:
        """Return the test scores by seed."""
        cells = self.shuffled if shuffled else self.trained
        scores = {cell.seed: cells[cell]["score"] for cell in cells if (cell.model, cell.task) == (model, task)}
        return dict(sorted(scores.items()))

    def matrix(self, model: str) -> np.ndarray:
        """Return the test scores [tasks, seeds], NaN where missing."""
        matrix = np.full((len(self.tasks), len(self.seeds)), np.nan)
        for row, task in enumerate(self.tasks):
            for seed, score in self.scores(model, task.name).items():
                matrix[row, self.seeds.index(seed)] = score
        return matrix


@dataclass(frozen=True)
class TaskFacts:
    """A task as reported. `test` is the number of its test examples."""

    name: str
    title: str
    language: str
    metric: str
    test: int


def read_evaluation(output: Path, baseline: str | None = None) -> Evaluation:
    """Read OUTPUT/results.jsonl. Raises DetourError for missing or incomparable results or an unknown baseline."""
    path = output / RESULTS
    results = read_results(output)
    if not results:
        raise DetourError(f"{path}: no results yet; evaluate a model first (megatron-detour evaluate)")
    for cell, result in results.items():
        _check(path, cell, result)
    _refuse_mixed(path, results)
    models = list(dict.fromkeys(cell.model for cell in results))
    if baseline is not None and baseline not in models:
        raise DetourError(
            f"--baseline {baseline}: not in {path}{nearest(baseline, models)}; choose from {', '.join(models)}"
        )
    trained = {cell: result for cell, result in results.items() if not cell.shuffled}
    shown = list(dict.fromkeys(cell.model for cell in trained)) or models
    first = baseline if baseline in shown else shown[0]
    return Evaluation(
        output=output,
        models=(first, *(model for model in shown if model != first)),
        tasks=_tasks(results),
        trained=trained,
        shuffled={cell: result for cell, result in results.items() if cell.shuffled},
    )


def _check(path: Path, cell: Cell, result: Result) -> None:
    for key in REQUIRED:
        if key not in result:
            raise DetourError(f"{path}: the result of {cell} lacks {key!r}; remove its line and evaluate again")
    if result["metric"] not in METRICS:
        raise DetourError(f"{path}: {cell} has the unknown metric {result['metric']!r}; remove its line")
    score = result["score"]
    if score is None or not math.isfinite(score):
        raise DetourError(
            f"{path}: the score {score!r} of {cell} is not a finite number; remove its line and evaluate again"
        )


def _refuse_mixed(path: Path, results: dict[Cell, Result]) -> None:
    """Raise DetourError if the results are not comparable."""
    protocols = _differing(result["protocol"] for result in results.values())
    if protocols:
        raise DetourError(
            f"{path}: results of protocols {' and '.join(map(repr, protocols))} are not comparable; use a separate "
            "--output per protocol"
        )
    for task in dict.fromkeys(cell.task for cell in results):
        alike = [result for cell, result in results.items() if cell.task == task]
        for key, values in _definition(alike):
            if differing := _differing(values):
                raise DetourError(
                    f"{path}: results of task {task!r} are not comparable, they differ in {key} "
                    f"({' and '.join(map(str, differing))}); keep the lines of one of them, or use a separate --output"
                )


def _definition(results: list[Result]) -> list[tuple[str, list[Any]]]:
    """Return the values of each property that must agree between results of a task."""
    own = [(key, [result.get(key) for result in results]) for key in TASK_KEYS]
    hashes = [result.get("identity", {}) for result in results]
    return own + [(title, [each[key][:12] for each in hashes if key in each]) for key, title in IDENTITY_KEYS.items()]


def _differing(values: Iterable[Any]) -> list[Any]:
    """Return the first two distinct values, or nothing if all are equal."""
    distinct: list[Any] = []
    for value in values:
        if value not in distinct:
            distinct.append(value)
    return distinct[:2] if len(distinct) > 1 else []


def _tasks(results: dict[Cell, Result]) -> tuple[TaskFacts, ...]:
    latest: dict[str, Result] = {}
    for cell, result in results.items():
        latest[cell.task] = result  # the latest: its title may have been corrected
    facts = [_facts(name, result) for name, result in latest.items()]
    return tuple(sorted(facts, key=lambda task: (task.language, task.name)))


def _facts(name: str, result: Result) -> TaskFacts:
    task = load_task(name) if name in packaged_tasks() else None
    # for a user's task, use the facts stored in its results
    title, language = (
        (task.title, task.language) if task else (result.get("title") or name, result.get("language") or "")
    )
    return TaskFacts(name, _shown(title), _shown(language), result["metric"], result["examples"].get("test", 0))


def _shown(text: str) -> str:
    return text if text.isprintable() else ascii(text)


@dataclass(frozen=True)
class Predictions:
    """The predictions for one task's test split. All files have the same gold answers."""

    output: Path
    labels: tuple[str, ...]
    gold: list[Any]
    predicted: dict[Cell, list[Any]]

    def contributions(self, metric: str, cell: Cell) -> np.ndarray:
        """Return each example's contribution to a cell's score, [n, k]. Raises DetourError for invalid predictions."""
        try:
            return METRICS[metric].contributions(self.labels, self.gold, self.predicted[cell])
        except DetourError as fault:
            raise DetourError(f"{predictions_path(self.output, cell)}: {fault}; {REMEDY}") from None


def read_predictions(output: Path, metric: str, cells: Iterable[Cell]) -> Predictions | None:
    """Read the existing predictions of these cells, all of one task; None if there are none.

    Raises DetourError for a damaged file, and for files with different gold answers.
    """
    first: dict[str, Any] | None = None
    predicted = {}
    for cell in cells:
        path = predictions_path(output, cell)
        if not path.exists():
            continue
        content = _read(path, metric)
        first = first or content
        if content["gold"] != first["gold"] or content["labels"] != first["labels"]:
            raise DetourError(
                f"{path}: the gold answers differ from the task's other predictions, so the models were tested on "
                "different data; use a separate --output per dataset"
            )
        predicted[cell] = content["predicted"]
    return Predictions(output, tuple(first["labels"]), first["gold"], predicted) if first else None


def _read(path: Path, metric: str) -> dict[str, Any]:
    try:
        content = read_json_object(path)
    except DetourError as fault:
        raise DetourError(f"{fault}; {REMEDY}") from None
    gold, predicted, labels = (content.get(key) for key in ("gold", "predicted", "labels"))
    alike = any(_is(gold, form) and _is(predicted, form) for form in METRICS[metric].answers)
    if not alike or not _is(labels, list[str]) or not len(gold) == len(predicted) > 0:
        raise DetourError(f'{path}: not predictions of the form {{"labels", "gold", "predicted"}}; {REMEDY}')
    return content


def _is(value: Any, form: Any) -> bool:
    try:
        msgspec.convert(value, form)
    except msgspec.ValidationError:
        return False
    return True
