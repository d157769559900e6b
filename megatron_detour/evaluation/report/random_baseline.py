"""The random baseline: the best score on a task's test split without reading its texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_detour.evaluation.metrics import Metric

DRAWS = 20
LEAST_MARGIN = 0.01
SEED = 0


@dataclass(frozen=True)
class RandomBaseline:
    """`score` is the best score of the guesses below; scores up to `high` are not distinguishable from it."""

    score: float
    high: float


def random_baseline(metric: Metric, labels: Sequence[str], gold: Sequence[Any]) -> RandomBaseline:
    """Return the best score of guesses that use the answers' frequencies in the test split but not its texts.

    The guesses are constant answers (Metric.constant_answers), and answers drawn at random from the gold answers.
    `high` is 1.96 standard deviations of the random guesses above the best score, at least one point.
    """
    gold = gold[: metric.baseline_examples]

    def score(guess: list[Any]) -> float:
        return float(metric.from_totals(metric.contributions(labels, gold, guess).sum(0)))

    rng = np.random.default_rng(SEED)
    draws = [rng.integers(0, len(gold), len(gold)) for _ in range(DRAWS)]
    drawn = [score([metric.adapt(gold[i], own) for i, own in zip(draw, gold, strict=True)]) for draw in draws]
    constant = [score([answer] * len(gold)) for answer in metric.constant_answers(gold)]
    best = max(float(np.mean(drawn)), 0.0, *constant)
    return RandomBaseline(best, best + max(1.96 * float(np.std(drawn, ddof=1)), LEAST_MARGIN))
