"""The results of an evaluation as they compare: of one protocol, one definition of each task, one test split."""

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
from megatron_detour.evaluation.task import known_tasks, load_task
from megatron_detour.evaluation.task_types import METRICS
from megatron_detour.structured import read_json_object

REQUIRED = ("protocol", "metric", "score", "scores", "examples", "seconds")
OF_A_TASK = ("metric", "ner_head", "examples")  # keys of a result that must agree within a task
REMEDY = "remove the file: the next evaluation makes it again, and until then the report does without"
OF_ITS_IDENTITY = {  # hashes, where a result has them
    "format": "format of results",
    "task": "definition of the task",
    "data": "data",
    "protocol": "protocol",
}


@dataclass(frozen=True)
class Evaluation:
    """Results by cells. `trained` have true labels, `shuffled` shuffled ones; the two are never mixed.

    `models` are in the order of their first result, the baseline first; one that has nothing but shuffled results is
    none of them, unless there is no other. `tasks` are by language and name.
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
        """Those with results of shuffled labels."""
        return list(dict.fromkeys(cell.model for cell in self.shuffled))

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        """All seeds that any model has on any task, with true labels."""
        return tuple(sorted({cell.seed for cell in self.trained}))

    @property
    def protocol(self) -> str:
        return next(iter((self.trained or self.shuffled).values()))["protocol"]

    def scores(self, model: str, task: str, *, shuffled: bool = False) -> dict[int, float]:
        """The test scores by seed."""
        cells = self.shuffled if shuffled else self.trained
        scores = {cell.seed: cells[cell]["score"] for cell in cells if (cell.model, cell.task) == (model, task)}
        return dict(sorted(scores.items()))

    def matrix(self, model: str) -> np.ndarray:
        """The test scores [tasks, seeds], NaN where there is none."""
        matrix = np.full((len(self.tasks), len(self.seeds)), np.nan)
        for row, task in enumerate(self.tasks):
            for seed, score in self.scores(model, task.name).items():
                matrix[row, self.seeds.index(seed)] = score
        return matrix


@dataclass(frozen=True)
class TaskFacts:
    """What a report says of a task. `test` is the number of its test examples."""

    name: str
    title: str
    language: str
    metric: str
    test: int


def read_evaluation(output: Path, baseline: str | None = None) -> Evaluation:
    """Reads OUTPUT/results.jsonl. Raises DetourError for none, for results that do not compare, an unknown baseline."""
    path = output / RESULTS
    results = read_results(output)
    if not results:
        raise DetourError(f"{path}: holds no result yet; evaluate a model first (megatron-detour evaluate)")
    for cell, result in results.items():
        _check(path, cell, result)
    _refuse_mixed(path, results)
    models = list(dict.fromkeys(cell.model for cell in results))
    if baseline is not None and baseline not in models:
        raise DetourError(
            f"--baseline {baseline}: {path} has no such model{nearest(baseline, models)}; it has {', '.join(models)}"
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
            raise DetourError(f"{path}: the result of {cell} lacks the key {key!r}; remove its line and evaluate again")
    if result["metric"] not in METRICS:
        raise DetourError(f"{path}: unknown metric {result['metric']!r} of {cell}; remove its line")
    score = result["score"]
    if score is None or not math.isfinite(score):
        raise DetourError(
            f"{path}: the score of {cell} is {score!r}, not a finite number; remove its line and evaluate again"
        )


def _refuse_mixed(path: Path, results: dict[Cell, Result]) -> None:
    """Raises DetourError where results were not made alike: a table of them would compare nothing."""
    protocols = _differing(result["protocol"] for result in results.values())
    if protocols:
        raise DetourError(
            f"{path}: holds results of the protocols {' and '.join(map(repr, protocols))}, which do not compare; give "
            "each protocol an --output of its own"
        )
    for task in dict.fromkeys(cell.task for cell in results):
        alike = [result for cell, result in results.items() if cell.task == task]
        for key, values in _definition(alike):
            if differing := _differing(values):
                raise DetourError(
                    f"{path}: results of the task {task!r} do not compare, as they differ in their {key} "
                    f"({' and '.join(map(str, differing))}); keep the lines of one kind, or give each an --output of "
                    "its own"
                )


def _definition(results: list[Result]) -> list[tuple[str, list[Any]]]:
    """By what may differ between results of a task, its values."""
    own = [(key, [result.get(key) for result in results]) for key in OF_A_TASK]
    hashes = [result.get("identity", {}) for result in results]
    return own + [(title, [each[key][:12] for each in hashes if key in each]) for key, title in OF_ITS_IDENTITY.items()]


def _differing(values: Iterable[Any]) -> list[Any]:
    """The first two values that differ; empty where all are the same."""
    distinct: list[Any] = []
    for value in values:
        if value not in distinct:
            distinct.append(value)
    return distinct[:2] if len(distinct) > 1 else []


def _tasks(results: dict[Cell, Result]) -> tuple[TaskFacts, ...]:
    latest: dict[str, Result] = {}
    for cell, result in results.items():
        latest[cell.task] = result  # the latest, as a title may have been mended
    facts = [_facts(name, result) for name, result in latest.items()]
    return tuple(sorted(facts, key=lambda task: (task.language, task.name)))


def _facts(name: str, result: Result) -> TaskFacts:
    task = load_task(name) if name in known_tasks() else None
    # a user's own is known by what its results say
    title, language = (
        (task.title, task.language) if task else (result.get("title") or name, result.get("language") or "")
    )
    return TaskFacts(name, _shown(title), _shown(language), result["metric"], result["examples"].get("test", 0))


def _shown(text: str) -> str:
    return text if text.isprintable() else ascii(text)


@dataclass(frozen=True)
class Predictions:
    """The predictions of one task on its test split, whose right answers are those of every file."""

    output: Path
    labels: tuple[str, ...]
    gold: list[Any]
    predicted: dict[Cell, list[Any]]

    def contributions(self, metric: str, cell: Cell) -> np.ndarray:
        """What each example adds to the score of a cell [n, k]. Raises DetourError for what is no label or number."""
        try:
            return METRICS[metric].contributions(self.labels, self.gold, self.predicted[cell])
        except DetourError as fault:
            raise DetourError(f"{predictions_path(self.output, cell)}: {fault}; {REMEDY}") from None


def read_predictions(output: Path, metric: str, cells: Iterable[Cell]) -> Predictions | None:
    """Reads those of the cells, all of one task, that are there; None where there is none.

    Raises DetourError for a file that is damaged, and for two with other right answers.
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
                f"{path}: the right answers are not those of the task's other predictions, so the models were tested "
                "on different data; give each data set an --output of its own"
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
