"""Linear probes: what a classifier without depth reads from the frozen states of each layer."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from megatron_detour.analysis.hidden_states import POOLS, Encoder, Report
from megatron_detour.errors import DetourError
from megatron_detour.evaluation.examples import read_dataset
from megatron_detour.evaluation.metrics import Metric
from megatron_detour.evaluation.task import Task
from megatron_detour.evaluation.task_types import METRICS
from megatron_detour.evaluation.task_types.classification import Classification
from megatron_detour.evaluation.task_types.encode import Example
from megatron_detour.settings import Choice, Entries, Range

ABOVE_ZERO, SEED = Range(above=0), Range(least=0, below=2**31)
ITERATIONS = 1000  # of L-BFGS; a fit that needs more is not converged, and says so


@dataclass(frozen=True)
class ProbeOptions:
    """Options of a linear probe: each field is a flag of megatron-detour analyze probe."""

    pooling: Annotated[str, Choice(("mean", "cls")), "of a layer's states: mean over tokens, or [CLS]"] = "mean"
    max_tokens: Annotated[int, ABOVE_ZERO, "tokens of a text; longer ones are cut"] = 512
    batch: Annotated[int, ABOVE_ZERO, "texts per forward pass"] = 16
    seeds: Annotated[
        tuple[Annotated[int, SEED], ...],
        Entries(least=1, unique=True),
        "of the training examples that are drawn; without a draw, all give the same",
    ] = (42, 43, 44)
    train_examples: Annotated[int, ABOVE_ZERO, "maximum training examples, drawn anew by each seed"] = 4000
    dev_examples: Annotated[int, ABOVE_ZERO, "maximum validation examples"] = 1000
    strengths: Annotated[
        tuple[Annotated[float, ABOVE_ZERO], ...],
        Entries(least=1, unique=True),
        "values of C, the inverse of the L2 penalty, of which the best on dev is used",
    ] = (0.001, 0.01, 0.1, 1.0)


@dataclass(frozen=True)
class ProbeResult:
    """Scores of a model's layers on the test split, [layers][seeds], by the task's metric."""

    model: str
    task: str
    metric: str
    layers: tuple[int, ...]
    seeds: tuple[int, ...]
    scores: tuple[tuple[float, ...], ...]
    strengths: tuple[tuple[float, ...], ...]  # the C of each fit
    unconverged: int  # fits that had not converged after ITERATIONS
    baseline: float  # score of the most frequent label
    examples: dict[str, int]  # by split
    options: ProbeOptions

    @property
    def mean(self) -> np.ndarray:
        """Mean over seeds [layers]."""
        return np.mean(self.scores, 1)

    @property
    def best_layer(self) -> int:
        return self.layers[int(self.mean.argmax())]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"summary": {"mean": self.mean.tolist(), "best_layer": self.best_layer}}


def probe(model: Path, task: Task, data: Path, options: ProbeOptions | None = None, *, layer: int = -1) -> float:
    """Return the score of one layer, by default the last, mean over seeds. Raises DetourError as `probe_layers`."""
    return float(probe_layers(model, task, data, options, layers=(layer,)).mean[0])


def probe_layers(
    model: Path,
    task: Task,
    data: Path,
    options: ProbeOptions | None = None,
    *,
    layers: Sequence[int] | None = None,
    report: Report = lambda texts: None,
) -> ProbeResult:
    """Fit a multinomial logistic regression (scikit-learn's) to standardized states of each layer of a frozen encoder.

    C is the one of `options.strengths` with the best score on dev, the smallest of equals; the test split is scored
    once. `layers` may count from the end. Raises DetourError for tasks of another type than classification, invalid
    data, layers that the model lacks, and folders that are not encoders.
    """
    options = options or ProbeOptions()
    if not isinstance(task.kind, Classification):
        raise DetourError(f"task {task.name}: a linear probe needs a task of type classification, not {task.type}")
    dataset = read_dataset(task, data)
    encoder = Encoder.open(model)
    chosen = _chosen_layers(layers, len(encoder.layers), model)
    draws = _draws(len(dataset.train), options)
    used = sorted({i for draw in draws.values() for i in draw})
    splits = {
        "train": [dataset.train[i] for i in used],
        "dev": _first_draw(dataset.dev, options.dev_examples),
        "test": dataset.test,
    }
    states = {name: _states(encoder, split, chosen, options, report) for name, split in splits.items()}
    gold = {name: [example["label"] for example in split] for name, split in splits.items()}
    fit = _Fit(METRICS[task.metric], dataset.labels, options.strengths)
    places = {number: place for place, number in enumerate(used)}
    found = [
        [fit({name: states[name][at] for name in states}, gold, [places[i] for i in draw]) for draw in draws.values()]
        for at in range(len(chosen))
    ]
    constant = fit.metric.constant_answers(gold["train"])[0]
    return ProbeResult(
        model=str(model),
        task=task.name,
        metric=task.metric,
        layers=tuple(chosen),
        seeds=tuple(draws),
        scores=tuple(tuple(score for score, _ in row) for row in found),
        strengths=tuple(tuple(strength for _, strength in row) for row in found),
        unconverged=fit.unconverged,
        baseline=fit.metric.score(dataset.labels, gold["test"], [constant] * len(gold["test"])),
        examples={name: len(split) for name, split in splits.items()} | {"train": len(next(iter(draws.values())))},
        options=options,
    )


class _Fit:
    """Fits and scores; counts the fits that did not converge."""

    def __init__(self, metric: Metric, labels: tuple[str, ...], strengths: Sequence[float]) -> None:
        self.metric, self.labels, self.strengths, self.unconverged = metric, labels, sorted(strengths), 0

    def __call__(
        self, states: dict[str, np.ndarray], gold: dict[str, list[str]], train: Sequence[int]
    ) -> tuple[float, float]:
        """Return the test score and C. `train` are the rows of the training states to fit to."""
        from sklearn.preprocessing import StandardScaler

        answers = [gold["train"][i] for i in train]
        if len(set(answers)) < 2:
            raise DetourError("the drawn training examples have one label; raise --train-examples")
        scaler = StandardScaler().fit(states["train"][train].astype(np.float64))
        scaled = {name: scaler.transform(each.astype(np.float64)) for name, each in states.items()}
        predict = {c: self._predictor(scaled["train"][train], answers, c) for c in self.strengths}
        if len(predict) > 1:
            dev = {c: self.metric.score(self.labels, gold["dev"], each(scaled["dev"])) for c, each in predict.items()}
            best = max(dev, key=dev.__getitem__)
        else:
            best = self.strengths[0]
        return self.metric.score(self.labels, gold["test"], predict[best](scaled["test"])), best

    def _predictor(self, x: np.ndarray, y: list[str], strength: float) -> Callable[[np.ndarray], list[str]]:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            model = LogisticRegression(C=strength, max_iter=ITERATIONS).fit(x, y)
        self.unconverged += any(issubclass(each.category, ConvergenceWarning) for each in caught)
        return lambda states: [str(label) for label in model.predict(states)]


def _chosen_layers(layers: Sequence[int] | None, count: int, model: Path) -> list[int]:
    if layers is None:
        return list(range(count))
    for layer in layers:
        if not -count <= layer < count:
            raise DetourError(f"{model}: no layer {layer}; it has layers 0 to {count - 1}")
    return [layer % count for layer in layers]


def _draws(examples: int, options: ProbeOptions) -> dict[int, list[int]]:
    """Return the numbers of the training examples by seed; of one seed where all examples are used."""
    if examples <= options.train_examples:
        return {options.seeds[0]: list(range(examples))}
    return {seed: sorted(random.Random(seed).sample(range(examples), options.train_examples)) for seed in options.seeds}


def _first_draw(examples: list[Example], most: int) -> list[Example]:
    if len(examples) <= most:
        return examples
    return [examples[i] for i in sorted(random.Random(0).sample(range(len(examples)), most))]


def _states(
    encoder: Encoder, examples: list[Example], layers: list[int], options: ProbeOptions, report: Report
) -> np.ndarray:
    """Return float32 [layers, examples, hidden]: all layers of thousands of texts are gigabytes."""
    second = None if examples[0]["text_b"] is None else [example["text_b"] for example in examples]
    features = encoder.tokenize([example["text"] for example in examples], options.max_tokens, second)
    pool = POOLS[options.pooling]
    return encoder.states(features, pool, batch=options.batch, layers=layers, dtype=np.float32, report=report)
