"""Metrics from their reference libraries, and as sums over examples for statistical tests that recompute them often.

Predictions and gold answers are lists with one item per example: tags (list of str), a label (str), several labels
(list of str), a score (float), an option index (int), or several option indices (list of int).

Undefined values are 0: precision, recall and F1 without predictions or gold answers, and correlations of constant
scores. Macro F1 is scikit-learn's: for classification the mean over labels that occur in gold or predictions; for
multi-label tasks the mean over all labels, so that a label absent from the split counts as 0 for every model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_detour.errors import DetourError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Answers = Sequence[Any]
_CONSTANT = 1e-10  # variance / mean square about the gold mean; float32 rounding of equal predictions is below this


class Metric(ABC):
    """One metric. `answers` are the types of the lists that it compares, used to validate stored predictions.

    A new metric implements `_contributions` and `from_totals`, or subclasses MeanOverExamples with `_values`. It is
    registered when a TaskType lists it.
    """

    name: str
    answers: tuple[Any, ...]
    baseline_examples: int | None = None  # examples used for the random baseline; None: all

    def score(self, labels: Sequence[str], gold: Answers, predicted: Answers) -> float:
        """Compute the metric with its reference library; `labels` are the dataset's labels.

        Raises DetourError if gold and predicted differ in length or contain an unknown label or a non-finite number.
        """
        self.check(gold, predicted)
        return self._score(labels, gold, predicted)

    def contributions(self, labels: Sequence[str], gold: Answers, predicted: Answers) -> NDArray[np.float64]:
        """Return each example's contribution to the totals, [examples, k] (see `from_totals`). Raises as `score`."""
        self.check(gold, predicted)
        return self._contributions(labels, gold, predicted)

    def check(self, gold: Answers, predicted: Answers) -> None:
        if len(gold) != len(predicted):
            raise DetourError(f"{self.name}: {len(gold)} gold answers, but {len(predicted)} predictions")
        if not len(gold):
            raise DetourError(f"{self.name}: no predictions")

    def _score(self, labels: Sequence[str], gold: Answers, predicted: Answers) -> float:
        return float(self.from_totals(self._contributions(labels, gold, predicted).sum(0)))

    @abstractmethod
    def _contributions(self, labels: Sequence[str], gold: Answers, predicted: Answers) -> NDArray[np.float64]: ...

    @abstractmethod
    def from_totals(self, totals: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute the metric from summed contributions: [..., k] -> [...]."""

    def constant_answers(self, gold: Answers) -> list[Any]:
        """Return the best constant predictions (the same for every example) given the frequencies in `gold`."""
        if not _are_sets(gold):
            return [Counter(gold).most_common(1)[0][0]]
        single = Counter(label for answer in gold for label in answer)
        sets = Counter(tuple(sorted(answer)) for answer in gold)
        return [list(sets.most_common(1)[0][0]), [single.most_common(1)[0][0]] if single else [], sorted(single)]

    def adapt(self, answer: Any, gold: Any) -> Any:
        """Convert another example's answer to the form of an answer to the example with answer `gold`."""
        return answer


class MeanOverExamples(Metric):
    """A metric that averages a value per example; totals are (sum, count)."""

    def _contributions(self, labels: Sequence[str], gold: Answers, predicted: Answers) -> NDArray[np.float64]:
        values = np.asarray(self._values(gold, predicted), dtype=np.float64)
        return np.stack([values, np.ones(len(values))], axis=1)

    @abstractmethod
    def _values(self, gold: Answers, predicted: Answers) -> Any:
        """[examples]"""

    def from_totals(self, totals: NDArray[np.float64]) -> NDArray[np.float64]:
        return _ratio(totals[..., 0], totals[..., 1])


class Accuracy(MeanOverExamples):
    name, answers = "accuracy", (list[str], list[int])

    def _score(self, labels: Sequence[str], gold: Answers, predicted: Answers) -> float:
        from sklearn.metrics import accuracy_score

        return float(accuracy_score(gold, predicted))

    def _values(self, gold: Answers, predicted: Answers) -> list[bool]:
        return [a == b for a, b in zip(gold, predicted, strict=True)]


class ExactMatch(MeanOverExamples):
    name, answers = "exact_match", (list[list[str]], list[list[int]])

    def _score(self, labels: Sequence[str], gold: Answers, predicted: Answers) -> float:
        from sklearn.metrics import accuracy_score

        return float(accuracy_score(*_padded(_one_hot(_all_items(gold, predicted), gold, predicted))))

    def _values(self, gold: Answers, predicted: Answers) -> NDArray[np.bool_]:
        right, given = _one_hot(_all_items(gold, predicted), gold, predicted)
        return (right == given).all(1)


class Hamming(MeanOverExamples):
    """The mean Jaccard index of gold and predicted sets, which FrenchMedMCQA calls Hamming score."""

    name, answers = "hamming", (list[list[int]],)

    def _score(self, labels: Sequence[str], gold: Answers, predicted: Answers) -> float:
        from sklearn.metrics import jaccard_score

        sets = _padded(_one_hot(_all_items(gold, predicted), gold, predicted))
        return float(jaccard_score(*sets, average="samples", zero_division=0))

    def _values(self, gold: Answers, predicted: Answers) -> NDArray[np.float64]:
        right, given = _one_hot(_all_items(gold, predicted), gold, predicted)
        return (right & given).sum(1) / np.maximum((right | given).sum(1), 1)


class F1(Metric):
    """F1 of one or several labels per example. Totals are true positives, false positives and false negatives (k = 3);
    for "macro" and "weighted" these per label, plus 1 if the label always counts (k = 4 * labels)."""

    answers = (list[str], list[list[str]])

    def __init__(self, average: str) -> None:
        self.average = average
        self.name = f"{average}_f1"

    def _score(self, labels: Sequence[str], gold: Answers, predicted: Answers) -> float:
        from sklearn.metrics import f1_score

        one_hot = _one_hot(labels, gold, predicted)
        counted = np.arange(len(labels)) if _are_sets(gold) else np.flatnonzero(one_hot.any(axis=(0, 1)))
        if not len(counted):
            return 0.0
        return float(f1_score(*_padded(one_hot), labels=counted, average=self.average, zero_division=0))

    def _contributions(self, labels: Sequence[str], gold: Answers, predicted: Answers) -> NDArray[np.float64]:
        right, given = _one_hot(labels, gold, predicted)
        always = np.full_like(right, _are_sets(gold))
        counts = np.stack([right & given, given & ~right, right & ~given, always], axis=-1).astype(np.float64)
        return counts[..., :3].sum(1) if self.average == "micro" else counts.reshape(len(counts), -1)

    def from_totals(self, totals: NDArray[np.float64]) -> NDArray[np.float64]:
        if self.average == "micro":
            return _f1(totals)
        by_label = totals.reshape(*totals.shape[:-1], -1, 4)
        support = by_label[..., 0] + by_label[..., 2]
        weights = support if self.average == "weighted" else by_label.any(-1).astype(np.float64)
        return _ratio((_f1(by_label[..., :3]) * weights).sum(-1), weights.sum(-1))


class EntityF1(Metric):
    """seqeval's F1 of whole entities. Totals are the numbers of correct, predicted and gold entities."""

    name, answers = "entity_f1", (list[list[str]],)
    baseline_examples = 500  # extracting entities is slow

    def check(self, gold: Answers, predicted: Answers) -> None:
        super().check(gold, predicted)
        for number, (tags, guesses) in enumerate(zip(gold, predicted, strict=True)):
            if len(tags) != len(guesses):
                raise DetourError(
                    f"{self.name}: example {number} has {len(tags)} words, but {len(guesses)} predicted tags"
                )

    def _score(self, labels: Sequence[str], gold: Answers, predicted: Answers) -> float:
        from seqeval.metrics import f1_score

        return float(f1_score(list(gold), list(predicted), zero_division=0))

    def _contributions(self, labels: Sequence[str], gold: Answers, predicted: Answers) -> NDArray[np.float64]:
        from seqeval.metrics.sequence_labeling import get_entities

        counts = np.zeros((len(gold), 3))
        for row, (tags, guesses) in enumerate(zip(gold, predicted, strict=True)):
            right, given = set(get_entities(list(tags))), set(get_entities(list(guesses)))
            counts[row] = len(right & given), len(given), len(right)
        return counts

    def from_totals(self, totals: NDArray[np.float64]) -> NDArray[np.float64]:
        return _ratio(2 * totals[..., 0], totals[..., 1] + totals[..., 2])

    def constant_answers(self, gold: Answers) -> list[Any]:
        return []  # F1 without entities is 0

    def adapt(self, answer: list[str], gold: list[str]) -> list[str]:
        """Truncate the tags, or pad them with "O", to the sentence's length."""
        return answer[: len(gold)] + ["O"] * (len(gold) - len(answer))


class Correlation(Metric):
    """Totals are the sums of x, y, xx, yy, xy and 1 for gold (x) and predicted (y) scores, both minus the mean of gold,
    which leaves the correlation unchanged and keeps the sums exact; for Spearman the same sums of ranks."""

    answers = (list[float],)

    def __init__(self, name: str) -> None:
        self.name = name

    def check(self, gold: Answers, predicted: Answers) -> None:
        super().check(gold, predicted)
        if not (np.isfinite(gold).all() and np.isfinite(predicted).all()):
            raise DetourError(f"{self.name}: scores are NaN or infinite; the model has probably diverged")

    def _score(self, labels: Sequence[str], gold: Answers, predicted: Answers) -> float:
        from scipy import stats

        # scipy returns NaN for constant scores, and noise for scores that are constant up to rounding
        if not all(_variances(self._contributions(labels, gold, predicted).sum(0))):
            return 0.0
        test = stats.pearsonr if self.name == "pearson" else stats.spearmanr
        return float(test(gold, predicted).statistic)

    def _contributions(self, labels: Sequence[str], gold: Answers, predicted: Answers) -> NDArray[np.float64]:
        x, y = np.asarray(gold, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
        if self.name == "spearman":
            from scipy.stats import rankdata

            x, y = rankdata(x), rankdata(y)
        x, y = x - x.mean(), y - x.mean()
        return np.stack([x, y, x * x, y * y, x * y, np.ones(len(x))], axis=1)

    def from_totals(self, totals: NDArray[np.float64]) -> NDArray[np.float64]:
        x_variance, y_variance = _variances(totals)
        covariance = totals[..., 4] - _ratio(totals[..., 0] * totals[..., 1], totals[..., 5])
        return np.clip(_ratio(covariance, np.sqrt(x_variance) * np.sqrt(y_variance)), -1.0, 1.0)

    def constant_answers(self, gold: Answers) -> list[Any]:
        return []  # the correlation of constant scores is 0


ACCURACY, EXACT_MATCH, HAMMING, ENTITY_F1 = Accuracy(), ExactMatch(), Hamming(), EntityF1()
MACRO_F1, WEIGHTED_F1, MICRO_F1 = F1("macro"), F1("weighted"), F1("micro")
PEARSON, SPEARMAN = Correlation("pearson"), Correlation("spearman")


def _are_sets(answers: Answers) -> bool:
    """Whether answers are sets of labels.

    If so, scikit-learn's macro F1 counts every label, absent ones as 0; otherwise it skips labels that occur neither
    in gold nor in predictions.
    """
    return isinstance(answers[0], list | tuple)


def _all_items(gold: Answers, predicted: Answers) -> list[Any]:
    return sorted({value for values in (*gold, *predicted) for value in values})


def _one_hot(labels: Sequence[Any], gold: Answers, predicted: Answers) -> NDArray[np.bool_]:
    """Return gold and predicted labels as booleans [2, examples, labels]."""
    columns = {label: i for i, label in enumerate(labels)}
    ones = np.zeros((2, len(gold), len(columns)), dtype=bool)
    for which, answers in enumerate((gold, predicted)):
        for row, answer in enumerate(answers):
            for label in [answer] if isinstance(answer, str) else answer:
                if label not in columns:
                    kind = ("gold answer", "prediction")[which]
                    raise DetourError(f"{kind} {label!r} of example {row} is not a label of the dataset")
                ones[which, row, columns[label]] = True
    return ones


def _padded(one_hot: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Add an empty column: scikit-learn reads a single column as binary classes."""
    return np.pad(one_hot, ((0, 0), (0, 0), (0, 1)))


def _ratio(above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(above, below, out=np.zeros(np.broadcast(above, below).shape), where=below != 0)


def _f1(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    return _ratio(2 * counts[..., 0], 2 * counts[..., 0] + counts[..., 1] + counts[..., 2])


def _variances(totals: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return sums of squares about the mean, 0 for numerically constant values."""
    x, y, xx, yy, _, count = np.moveaxis(totals, -1, 0)
    variances = [square - _ratio(total * total, count) for total, square in ((x, xx), (y, yy))]
    return tuple(np.where(v <= _CONSTANT * square, 0.0, v) for v, square in zip(variances, (xx, yy), strict=True))
