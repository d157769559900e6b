"""Metrics, by the libraries that define them, and as sums over examples for tests that recompute them many times.

Predictions and right answers are lists with an item an example: tags (list of str) in token-classification, a label
(str) in classification, labels (list of str) in multi-label, a score (float) in similarity, an option's number (int)
in multiple-choice, several of them (list of int) in multiple-answer.

What is undefined counts as 0: precision, recall and F1 without a prediction or a right answer, and a correlation of
constant scores. Macro F1 is scikit-learn's: of classes the mean over those that are right or predicted somewhere, in
multi-label over all labels, so that one that the split lacks counts as 0 for every model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_detour.errors import DetourError, nearest
from megatron_detour.evaluation.task import METRICS, Task

if TYPE_CHECKING:
    from numpy.typing import NDArray

Answers = Sequence[Any]
NAMES = tuple(dict.fromkeys(name for names in METRICS.values() for name in names))
_OF_LABELS = ("macro_f1", "weighted_f1", "micro_f1")
_CORRELATIONS = ("pearson", "spearman")
_CONSTANT = 1e-10  # variance over mean square about the gold mean: what float32 leaves of equal predictions is less


def scores(task: Task, labels: Sequence[str], gold: Answers, predicted: Answers) -> dict[str, float]:
    """All metrics of a task, by name; `labels` are the data set's. Raises DetourError where gold and predicted differ
    in length, or hold what is no label or number."""
    return {name: score(name, labels, gold, predicted) for name in task.metrics}


def score(name: str, labels: Sequence[str], gold: Answers, predicted: Answers) -> float:
    """One metric, by seqeval, scikit-learn or scipy. Raises DetourError as `scores` does."""
    _check(name, gold, predicted)
    if name in _CORRELATIONS:
        return _correlation(name, gold, predicted)
    if name == "entity_f1":
        from seqeval.metrics import f1_score

        return float(f1_score(list(gold), list(predicted), zero_division=0))
    from sklearn import metrics

    if name == "accuracy":
        return float(metrics.accuracy_score(gold, predicted))
    ones = _ones(labels if name in _OF_LABELS else _options(gold, predicted), gold, predicted)
    there = np.arange(ones.shape[2]) if _several(gold) else np.flatnonzero(ones.any(axis=(0, 1)))
    ones = np.pad(ones, ((0, 0), (0, 0), (0, 1)))  # scikit-learn takes a single column for two classes
    if name == "exact_match":
        return float(metrics.accuracy_score(*ones))
    if name == "hamming":
        return float(metrics.jaccard_score(*ones, average="samples", zero_division=0))
    average = name.removesuffix("_f1")
    return float(metrics.f1_score(*ones, labels=there, average=average, zero_division=0)) if len(there) else 0.0


def decomposes(name: str) -> bool:
    """Whether a metric can be computed from a sum over examples."""
    return name in NAMES


def contributions(name: str, labels: Sequence[str], gold: Answers, predicted: Answers) -> NDArray[np.float64]:
    """What each example adds to a metric's totals: [examples, k], see `score_of`. Raises DetourError as `scores` does.

    entity_f1 adds entities found, predicted and right (k 3); micro_f1 true positives, false positives and false
    negatives (k 3), macro_f1 and weighted_f1 these and 1 where it counts in any case, for each label (k 4 *
    labels); accuracy, exact_match and hamming their value and 1 (k 2); pearson the sums x, y, xx, yy, xy and 1 of
    gold (x) and predicted scores (y), both less the mean of gold, which changes no correlation but keeps the sums
    exact; spearman the same of ranks (k 6). Ranks are those among the predictions given here.
    """
    _check(name, gold, predicted)
    if name in _CORRELATIONS:
        return _sums(*_centred(name, gold, predicted))
    if name == "entity_f1":
        return _entities(gold, predicted)
    if name == "accuracy":
        return _with_ones(np.array([a == b for a, b in zip(gold, predicted, strict=True)], dtype=np.float64))
    right, given = _ones(labels if name in _OF_LABELS else _options(gold, predicted), gold, predicted)
    if name == "exact_match":
        return _with_ones((right == given).all(1).astype(np.float64))
    if name == "hamming":
        return _with_ones((right & given).sum(1) / np.maximum((right | given).sum(1), 1))
    counts = np.stack([right & given, given & ~right, right & ~given, np.full_like(right, _several(gold))], axis=-1)
    counts = counts.astype(np.float64)
    return counts[..., :3].sum(1) if name == "micro_f1" else counts.reshape(len(counts), -1)


def score_of(name: str, totals: NDArray[np.float64]) -> NDArray[np.float64]:
    """The metric of summed contributions: [..., k] -> [...]."""
    _check_name(name)
    totals = np.asarray(totals, dtype=np.float64)
    if name in _CORRELATIONS:
        return _correlation_of(totals)
    if name in ("accuracy", "exact_match", "hamming"):
        return _ratio(totals[..., 0], totals[..., 1])
    if name == "entity_f1":
        return _ratio(2 * totals[..., 0], totals[..., 1] + totals[..., 2])
    if name == "micro_f1":
        return _f1(totals)
    by_label = totals.reshape(*totals.shape[:-1], -1, 4)
    each = _f1(by_label[..., :3])
    weights = by_label[..., 0] + by_label[..., 2] if name == "weighted_f1" else by_label.any(-1).astype(np.float64)
    return _ratio((each * weights).sum(-1), weights.sum(-1))


def _check_name(name: str) -> None:
    if name not in NAMES:
        raise DetourError(f"unknown metric {name!r}{nearest(name, list(NAMES))}; there are {', '.join(NAMES)}")


def _check(name: str, gold: Answers, predicted: Answers) -> None:
    _check_name(name)
    if len(gold) != len(predicted):
        raise DetourError(f"{name}: {len(gold)} right answers, but {len(predicted)} predictions")
    if not len(gold):
        raise DetourError(f"{name}: there are no predictions")
    if name == "entity_f1":
        for number, (tags, others) in enumerate(zip(gold, predicted, strict=True)):
            if len(tags) != len(others):
                raise DetourError(f"{name}: example {number} has {len(tags)} words, but {len(others)} predicted tags")
    if name in _CORRELATIONS and not (np.isfinite(gold).all() and np.isfinite(predicted).all()):
        raise DetourError(f"{name}: not all scores are finite numbers; the model has most likely diverged")


def _several(gold: Answers) -> bool:
    """Whether answers are sets of labels.

    scikit-learn's macro F1 then counts every label, one that never occurs as 0; of classes it leaves out those that are
    neither right nor predicted anywhere.
    """
    return isinstance(gold[0], list | tuple)


def _options(gold: Answers, predicted: Answers) -> list[Any]:
    return sorted({value for values in (*gold, *predicted) for value in values})


def _ones(labels: Sequence[Any], gold: Answers, predicted: Answers) -> NDArray[np.bool_]:
    """Right and predicted labels: [2, examples, labels]."""
    columns = {label: i for i, label in enumerate(labels)}
    ones = np.zeros((2, len(gold), len(columns)), dtype=bool)
    for which, answers in enumerate((gold, predicted)):
        for row, answer in enumerate(answers):
            for label in [answer] if isinstance(answer, str) else answer:
                if label not in columns:
                    whose = ("the right answer", "the prediction")[which]
                    raise DetourError(f"{whose} of example {row} is {label!r}, not a label of the data set")
                ones[which, row, columns[label]] = True
    return ones


def _entities(gold: Answers, predicted: Answers) -> NDArray[np.float64]:
    from seqeval.metrics.sequence_labeling import get_entities

    counts = np.zeros((len(gold), 3))
    for row, (tags, others) in enumerate(zip(gold, predicted, strict=True)):
        right, given = set(get_entities(list(tags))), set(get_entities(list(others)))
        counts[row] = len(right & given), len(given), len(right)
    return counts


def _with_ones(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.stack([values, np.ones(len(values))], axis=1)


def _ratio(above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(above, below, out=np.zeros(np.broadcast(above, below).shape), where=below != 0)


def _f1(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    return _ratio(2 * counts[..., 0], 2 * counts[..., 0] + counts[..., 1] + counts[..., 2])


def _centred(name: str, gold: Answers, predicted: Answers) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, y = np.asarray(gold, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    if name == "spearman":
        from scipy.stats import rankdata

        x, y = rankdata(x), rankdata(y)
    return x - x.mean(), y - x.mean()


def _sums(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.stack([x, y, x * x, y * y, x * y, np.ones(len(x))], axis=1)


def _variances(totals: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sums of squares about the mean, 0 for what counts as constant."""
    x, y, xx, yy, _, count = np.moveaxis(totals, -1, 0)
    about = [square - _ratio(total * total, count) for total, square in ((x, xx), (y, yy))]
    return tuple(np.where(v <= _CONSTANT * square, 0.0, v) for v, square in zip(about, (xx, yy), strict=True))


def _correlation_of(totals: NDArray[np.float64]) -> NDArray[np.float64]:
    of_x, of_y = _variances(totals)
    together = totals[..., 4] - _ratio(totals[..., 0] * totals[..., 1], totals[..., 5])
    return np.clip(_ratio(together, np.sqrt(of_x) * np.sqrt(of_y)), -1.0, 1.0)


def _correlation(name: str, gold: Answers, predicted: Answers) -> float:
    from scipy import stats

    # scipy gives nan for constant scores, and noise for those that are constant but for rounding
    if not all(_variances(_sums(*_centred(name, gold, predicted)).sum(0))):
        return 0.0
    test = stats.pearsonr if name == "pearson" else stats.spearmanr
    return float(test(gold, predicted).statistic)
