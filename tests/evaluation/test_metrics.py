"""Metrics equal those of the libraries that define them, and sums over examples equal metrics."""

from __future__ import annotations

import random

import numpy as np
import pytest
from scipy import stats
from seqeval.metrics import f1_score as entity_f1
from sklearn.metrics import accuracy_score, f1_score, jaccard_score
from sklearn.preprocessing import MultiLabelBinarizer

from megatron_detour.errors import DetourError
from megatron_detour.evaluation.task_types import METRICS, TASK_TYPES

LABELS = ("a", "b", "c", "d", "e")  # e never occurs in the made-up answers
TAGS = ("O", "O", "O", "B-X", "I-X", "B-Y-Z", "I-Y-Z")


def _tags(rng):
    return [rng.choice(TAGS) for _ in range(rng.randint(1, 9))]


def _some(rng, items):
    return [item for item in items if rng.random() < 0.3]


MAKE = {
    "token-classification": _tags,
    "classification": lambda rng: rng.choice("aaabbcd"),
    "multi-label": lambda rng: _some(rng, "abcd"),
    "similarity": lambda rng: rng.choice((0.0, 1.5, 2.0, 4.0)) + rng.choice((0, 0, rng.random())),
    "multiple-choice": lambda rng: rng.randrange(5),
    "multiple-answer": lambda rng: _some(rng, range(5)) or [rng.randrange(5)],
}


def made_up(kind: str, seed: int, count: int = 40) -> tuple[list, list]:
    """Right answers and predictions, half of which are right."""
    rng = random.Random(seed)
    gold = [MAKE[kind](rng) for _ in range(count)]
    predicted = [answer if rng.random() < 0.5 else MAKE[kind](rng) for answer in gold]
    if kind == "token-classification":
        predicted = [(tags * 9)[: len(right)] for tags, right in zip(predicted, gold, strict=True)]
    return gold, predicted


def by_library(kind: str, name: str, gold: list, predicted: list) -> float:
    """The metric as one calls the library for this kind of answers."""
    if name == "entity_f1":
        return entity_f1(gold, predicted, zero_division=0)
    if name in ("pearson", "spearman"):
        return (stats.pearsonr if name == "pearson" else stats.spearmanr)(gold, predicted).statistic
    if kind in ("classification", "multiple-choice"):
        if name == "accuracy":
            return accuracy_score(gold, predicted)
        return f1_score(gold, predicted, average=name.removesuffix("_f1"), zero_division=0)
    # a matrix of all labels, as scikit-learn has it: one that never occurs counts as 0 in a macro average
    columns = MultiLabelBinarizer(classes=LABELS if kind == "multi-label" else None).fit([*gold, *predicted])
    ones = [columns.transform(answers) for answers in (gold, predicted)]
    if name == "exact_match":
        return accuracy_score(*ones)
    if name == "hamming":
        return jaccard_score(*ones, average="samples")
    return f1_score(*ones, average=name.removesuffix("_f1"), zero_division=0)


def summed(name: str, labels, gold: list, predicted: list) -> float:
    return float(METRICS[name].from_totals(METRICS[name].contributions(labels, gold, predicted).sum(0)))


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in TASK_TYPES for name in TASK_TYPES[kind].metric_names]
)
def test_metric_is_the_librarys_and_the_sum_over_examples(kind, name):
    for seed in range(25):
        gold, predicted = made_up(kind, seed)
        expected = by_library(kind, name, gold, predicted)
        assert METRICS[name].score(LABELS, gold, predicted) == pytest.approx(expected, abs=1e-12)
        assert summed(name, LABELS, gold, predicted) == pytest.approx(expected, abs=1e-12)
        assert 0 < abs(expected) < 1
    gold = made_up(kind, 99)[0]
    best = 0.8 if (kind, name) == ("multi-label", "macro_f1") else 1  # e, one label of five, counts as 0
    assert METRICS[name].score(LABELS, gold, gold) == pytest.approx(best, abs=1e-12)
    assert summed(name, LABELS, gold, gold) == pytest.approx(best, abs=1e-12)


def test_all_metrics_are_known_by_their_names():
    assert set(METRICS) == {
        *("entity_f1", "macro_f1", "micro_f1", "weighted_f1", "accuracy"),
        *("pearson", "spearman", "hamming", "exact_match"),
    }
    for task_type in TASK_TYPES.values():  # two metrics of one name would make reports read one for the other
        assert all(METRICS[metric.name] is metric for metric in task_type.metrics)


@pytest.mark.parametrize(
    ("name", "gold", "predicted", "expected"),
    [
        # one of two entities, and one that is none: 2 * 1 / (2 + 2)
        ("entity_f1", [["B-X", "I-X", "O", "B-X"]], [["B-X", "I-X", "B-X", "O"]], 0.5),
        ("entity_f1", [["I-X", "I-X"]], [["B-X", "I-X"]], 1),  # an entity may begin with I
        ("entity_f1", [["B-X", "I-X"]], [["B-X", "I-Y"]], 0),
        ("entity_f1", [["O"], ["O"]], [["O"], ["O"]], 0),
        ("entity_f1", [["B-X"]], [["O"]], 0),
        ("entity_f1", [["B-X"], ["I-X"]], [["B-X"], ["I-X"]], 1),  # an entity ends with its sentence
        ("macro_f1", ["a", "a", "b"], ["a", "a", "a"], 0.4),  # of a 4 / 5, of b 0; c, d and e do not occur
        ("macro_f1", ["a", "a", "b"], ["a", "c", "b"], (2 / 3 + 1 + 0) / 3),  # c is predicted only
        ("weighted_f1", ["a", "a", "b"], ["a", "a", "a"], 0.8 * 2 / 3),
        ("weighted_f1", ["a", "b"], ["c", "c"], 0),
        ("micro_f1", ["a", "a", "b"], ["a", "a", "a"], 2 / 3),
        ("macro_f1", [["a"], []], [[], []], 0),
        ("macro_f1", [[], []], [[], []], 0),
        ("weighted_f1", [[], []], [["a"], []], 0),
        ("micro_f1", [["a", "b"], []], [["a"], ["b"]], 0.5),
        ("exact_match", [["a", "b"], []], [["b", "a"], []], 1),
        ("exact_match", [["a"], []], [["b", "a"], []], 0.5),
        ("hamming", [[0, 1], [2]], [[1, 2], [2]], (1 / 3 + 1) / 2),
        ("hamming", [[0]], [[1]], 0),
        ("hamming", [[0], [0]], [[0], [0]], 1),  # only one option is ever named
        ("exact_match", [[0, 1], [2]], [[1, 0], [1, 2]], 0.5),
        ("accuracy", [0, 1, 2, 0], [0, 2, 2, 1], 0.5),
        ("pearson", [0.0, 1.0, 2.0], [5.0, 3.0, 1.0], -1),
        ("spearman", [0.0, 1.0, 2.0], [0.0, 1.0, 100.0], 1),
        ("pearson", [0.0, 1.0, 2.0], [1.3, 1.3, 1.3], 0),
        ("spearman", [0.0, 1.0, 2.0], [1.3, 1.3, 1.3], 0),
        ("pearson", [1.1, 1.1, 1.1], [0.0, 1.0, 2.0], 0),
        ("pearson", [2.0], [1.0], 0),
        ("pearson", [0.0, 1.0, 2.0], [1.3, 1.3 + 2e-7, 1.3 - 2e-7], 0),  # rounding of float32
    ],
)
def test_values_that_can_be_told_by_hand(recwarn, name, gold, predicted, expected):
    assert METRICS[name].score(LABELS, gold, predicted) == pytest.approx(expected, abs=1e-12)
    assert summed(name, LABELS, gold, predicted) == pytest.approx(expected, abs=1e-12)
    assert not recwarn.list


def test_many_totals_at_once():
    """As tests that swap predictions between two models compute them."""
    rng = np.random.default_rng(0)
    swap = rng.random((7, 3, 40)) < 0.5
    for kind, task_type in TASK_TYPES.items():
        gold, first = made_up(kind, 1)
        second = made_up(kind, 2)[1]
        if kind == "token-classification":
            second = [tags[::-1] for tags in first]
        for name in task_type.metric_names:
            if name == "spearman":  # ranks are those of the predictions given
                continue
            ours, theirs = (METRICS[name].contributions(LABELS, gold, predicted) for predicted in (first, second))
            totals = np.einsum("abn,nk->abk", swap, ours) + np.einsum("abn,nk->abk", ~swap, theirs)
            found = METRICS[name].from_totals(totals)
            assert found.shape == (7, 3)
            for at in np.ndindex(7, 3):
                mixed = [a if own else b for own, a, b in zip(swap[at], first, second, strict=True)]
                assert found[at] == pytest.approx(METRICS[name].score(LABELS, gold, mixed), abs=1e-12)


def test_correlation_of_scores_far_from_zero():
    """Sums of squares of such numbers would lose all digits were they not taken about the mean."""
    rng = np.random.default_rng(0)
    gold = 1e6 + rng.random(200)
    predicted = gold + 0.3 * rng.standard_normal(200)
    expected = stats.pearsonr(gold, predicted).statistic
    assert summed("pearson", (), gold.tolist(), predicted.tolist()) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", ["accuracy", "macro_f1"])
def test_scores_are_plain_numbers(name):
    assert type(METRICS[name].score(LABELS, ["a", "b"], ["a", "a"])) is float


@pytest.mark.parametrize(
    ("name", "gold", "predicted", "says"),
    [
        ("accuracy", [1, 2], [1], "accuracy: 2 gold answers, but 1 predictions"),
        ("accuracy", [], [], "accuracy: no predictions"),
        ("entity_f1", [["O"], ["O", "O"]], [["O"], ["O"]], "entity_f1: example 1 has 2 words, but 1 predicted tags"),
        ("macro_f1", ["a", "b"], ["a", "f"], "prediction 'f' of example 1 is not a label of the dataset"),
        ("micro_f1", [["a", "f"]], [["a"]], "gold answer 'f' of example 0 is not a label of the dataset"),
        ("pearson", [1.0, 2.0], [1.0, float("nan")], "pearson: scores are NaN or infinite; the model has"),
    ],
)
def test_answers_that_do_not_fit_are_named(name, gold, predicted, says):
    for compute in (METRICS[name].score, METRICS[name].contributions):
        with pytest.raises(DetourError, match=says):
            compute(LABELS, gold, predicted)
