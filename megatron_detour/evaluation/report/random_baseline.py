"""What a task's test split gives to a model that does not read its texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DRAWS = 20
MOST_SENTENCES = 500  # of named entities, which take long to find
LEAST_MARGIN = 0.01
SEED = 0


@dataclass(frozen=True)
class Chance:
    """`score` is the best of the guesses below; up to `high` a score is no better than that, by the luck of a split."""

    score: float
    high: float


def chance(metric: str, labels: Sequence[str], gold: Sequence[Any]) -> Chance:
    """The best score of guesses that know the test split's frequencies and nothing of its texts.

    The guesses are the most frequent answer for every example, where an answer is a list also its most frequent label
    and all labels at once; and answers drawn at random from the right ones, tags cut or filled up with "O" to the
    sentence's length. `high` lies 1.96 standard deviations of the random guesses above the best one, a point at least.
    """
    if metric == "entity_f1":
        gold = gold[:MOST_SENTENCES]
    drawn = [_score(metric, labels, gold, guess) for guess in _random(metric, gold)]
    constant = [_score(metric, labels, gold, [answer] * len(gold)) for answer in _constants(metric, gold)]
    best = max(float(np.mean(drawn)), 0.0, *constant)
    return Chance(best, best + max(1.96 * float(np.std(drawn, ddof=1)), LEAST_MARGIN))


def _score(metric: str, labels: Sequence[str], gold: Sequence[Any], guess: list[Any]) -> float:
    from megatron_detour.evaluation.metrics import contributions, score_of

    return float(score_of(metric, contributions(metric, labels, gold, guess).sum(0)))


def _random(metric: str, gold: Sequence[Any]) -> Iterator[list[Any]]:
    rng = np.random.default_rng(SEED)
    for _ in range(DRAWS):
        drawn = [gold[i] for i in rng.integers(0, len(gold), len(gold))]
        if metric == "entity_f1":
            drawn = [_fitted(tags, len(own)) for tags, own in zip(drawn, gold, strict=True)]
        yield drawn


def _fitted(tags: list[str], length: int) -> list[str]:
    return tags[:length] + ["O"] * (length - len(tags))


def _constants(metric: str, gold: Sequence[Any]) -> list[Any]:
    """Answers that can be given to every example. Tags have none: without an entity F1 is 0; nor has a correlation."""
    if metric in ("entity_f1", "pearson", "spearman"):
        return []
    if not isinstance(gold[0], list):
        return [Counter(gold).most_common(1)[0][0]]
    single = Counter(label for answer in gold for label in answer)
    sets = Counter(tuple(sorted(answer)) for answer in gold)
    return [list(sets.most_common(1)[0][0]), [single.most_common(1)[0][0]] if single else [], sorted(single)]
