"""Is a difference between models more than chance? Means over seeds, bootstrap, permutation test, Holm's correction.

Scores are shares of 1. Every difference is a - b, so above 0 where a is better; every p is two-sided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

LEVEL = 0.05  # what counts as significant; intervals are of 1 - LEVEL
TIE = 0.0005  # a difference below 0.05 points is not seen in a table of one decimal
_ROUNDING = 1e-12  # differences that are equal on paper differ by this much in floating point
_CHUNK = 4_000_000  # numbers held at once
_EXACT_IN_SINGLE = 2**24


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (n - 1) of `count` values; no deviation of a single value."""

    mean: float
    sd: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        array = np.asarray(values, dtype=np.float64)
        if not len(array):
            raise ValueError("no values to take the mean of")
        return cls(float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else None, len(array))

    def interval(self) -> tuple[float, float] | None:
        """The 95% interval of the mean by Student's t, None for a single value. With 3 values: mean +- 2.5 sd."""
        if self.sd is None:
            return None
        from scipy.stats import t

        half = float(t.ppf(1 - LEVEL / 2, self.count - 1)) * self.sd / self.count**0.5
        return self.mean - half, self.mean + half


def over_seeds(scores: Mapping[tuple[str, str, int], float]) -> dict[tuple[str, str], Spread]:
    """Scores by (model, task, seed) to their spread over seeds by (model, task), in the order of first appearance."""
    groups: dict[tuple[str, str], list[float]] = {}
    for (model, task, _), score in scores.items():
        groups.setdefault((model, task), []).append(score)
    return {key: Spread.of(values) for key, values in groups.items()}


@dataclass(frozen=True)
class Bootstrap:
    """A mean difference with its 95% interval and p; `units` is the number of what was drawn: cells, or tasks."""

    mean: float
    low: float | None
    high: float | None
    p: float
    units: int


def paired_bootstrap(
    a: np.ndarray,
    b: np.ndarray,
    resamples: int = 10_000,
    seed: int = 0,
    clusters: Literal["tasks"] | None = None,
) -> Bootstrap:
    """Compares two models by their scores [tasks, seeds]; NaN where a cell is missing, which leaves out the pair.

    Draws (task, seed) cells with replacement, as arXiv 2605.12438 does ("paired bootstrap over tasks x seeds"). The
    seeds of a task are not independent of each other: where the question is whether a model would be better on other
    tasks of this kind, `clusters="tasks"` draws whole tasks with all of their seeds.

    The interval is that of percentiles, over whole tasks Student's t of the tasks' means, as percentiles of a few
    units are much too narrow (of four without a difference they leave out 0 in 18% of cases); None for one task. p
    is twice the smaller share of resampled means on either side of 0, both with one more in numerator and
    denominator, so that p is never 0. A few units cannot show more than they would if all pointed one way, which by
    a sign test is 2 / 2^units: p is never below that. Raises ValueError for no pair at all.
    """
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    if difference.ndim != 2:
        raise ValueError(f"scores must be [tasks, seeds], they have {difference.ndim} dimensions")
    there = ~np.isnan(difference)
    if not there.any():
        raise ValueError("the models have no cell in common")
    if clusters == "tasks":
        kept = there.any(1)
        sums, counts = np.where(there, difference, 0.0).sum(1)[kept], there.sum(1)[kept]
    else:
        sums = difference[there]
        counts = np.ones(len(sums), dtype=np.int64)
    mean = float(sums.sum() / counts.sum())
    means = _resampled_means(sums, counts, resamples, seed)
    if clusters == "tasks":
        low, high = Spread.of(list(sums / counts)).interval() or (None, None)
    else:
        low, high = map(float, np.quantile(means, [LEVEL / 2, 1 - LEVEL / 2]))
    below, above = (means <= _ROUNDING).sum(), (means >= -_ROUNDING).sum()
    p = max(2 * (int(min(below, above)) + 1) / (resamples + 1), 2.0 ** (1 - len(sums)))
    return Bootstrap(mean, low, high, min(1.0, p), len(sums))


def _resampled_means(sums: np.ndarray, counts: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means [resamples] of units drawn with replacement; a unit is the sum of its cells, and how many they are."""
    rng, units = np.random.default_rng(seed), len(sums)
    rows, means = max(1, _CHUNK // units), []
    for start in range(0, resamples, rows):
        drawn = rng.integers(0, units, (min(rows, resamples - start), units))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    return np.concatenate(means)


@dataclass(frozen=True)
class Permutation:
    """A difference of scores on one task and the p of a permutation test."""

    difference: float
    p: float


def permutation_test(
    a: np.ndarray,
    b: np.ndarray,
    score: Callable[[np.ndarray], np.ndarray],
    permutations: int = 10_000,
    seed: int = 0,
) -> Permutation:
    """Compares two models on the same test examples, by what each example adds to the score [seeds, n, k].

    `score` makes scores [...] of totals [..., k] (metrics.score_of). Each permutation swaps the two models on a random
    half of the examples, an example in all seeds at once; the statistic is the difference of the mean scores over
    seeds. p is the share of permutations, the true one among them, with a difference at least as large on either side.

    The test takes the fine-tuned models as they are: it tells whether the difference would hold on other examples of
    this kind, not whether it would with other seeds. Source: approximate randomisation (Noreen 1989; Yeh 2000).
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.ndim != 3 or a.shape != b.shape:
        raise ValueError(f"contributions must both be [seeds, n, k], they are {a.shape} and {b.shape}")
    totals_a, totals_b = (each.sum(1, dtype=np.float64) for each in (a, b))
    observed = float((score(totals_a) - score(totals_b)).mean())
    seeds, _, width = a.shape
    # Where the models agree a swap moves nothing: most examples, and for counts of right answers some columns.
    moved = (a != b).any((0, 2))
    change = (b[:, moved].astype(np.float64) - a[:, moved]).transpose(1, 0, 2).reshape(-1, seeds * width)
    columns = change.any(0)
    change = _single_if_exact(change[:, columns])
    rng, count = np.random.default_rng(seed), 1
    rows = max(1, _CHUNK // (len(change) + 8 * seeds * width))
    for start in range(0, permutations, rows):
        swaps = _coins(rng, min(rows, permutations - start), len(change)).astype(change.dtype)
        shift = np.zeros((len(swaps), seeds * width))
        shift[:, columns] = swaps @ change
        shift = shift.reshape(-1, seeds, width)
        found = (score(totals_a + shift) - score(totals_b - shift)).mean(-1)
        count += int((np.abs(found) >= abs(observed) - _ROUNDING).sum())
    return Permutation(observed, count / (permutations + 1))


def _coins(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Random zeros and ones [rows, columns]."""
    width = -(-columns // 8)
    drawn = np.frombuffer(rng.bytes(rows * width), dtype=np.uint8).reshape(rows, width)
    return np.unpackbits(drawn, axis=1, count=columns)


def _single_if_exact(change: np.ndarray) -> np.ndarray:
    """Counts add up exactly in single precision too, in half the time."""
    whole = (change == np.rint(change)).all() and np.abs(change).sum(0).max(initial=0) < _EXACT_IN_SINGLE
    return change.astype(np.float32) if whole else change


def holm(p_values: Iterable[float]) -> list[float]:
    """Corrects p for the number of comparisons, in the given order (Holm 1979).

    With these the chance of one false finding or more among all comparisons is no greater than the level.
    """
    p = np.asarray(list(p_values), dtype=np.float64)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected.tolist()


def holds(p: float | None, interval: tuple[float, float] | None, level: float = LEVEL) -> bool:
    """Whether a difference is more than chance on both counts: `p` for other examples, `interval` for other seeds.

    A permutation test alone would not do. It takes the fine-tuned models as they are, and on a large test split two
    lots of seeds of the very same model differ "significantly" (tests/evaluation/test_statistics.py shows it).
    """
    return p is not None and p < level and interval is not None and (interval[0] > 0 or interval[1] < 0)


@dataclass(frozen=True)
class Tally:
    """On how many tasks a model is better, worse, or within `TIE`; and on how many of them clearly."""

    wins: int
    losses: int
    ties: int
    clear_wins: int
    clear_losses: int


def tally(differences: Sequence[float], clear: Sequence[bool]) -> Tally:
    """Counts mean differences [tasks]; `clear` says of which it `holds` that they are more than chance."""
    seen = [(d > 0, s) for d, s in zip(differences, clear, strict=True) if abs(d) >= TIE]
    return Tally(
        wins=sum(above for above, _ in seen),
        losses=sum(not above for above, _ in seen),
        ties=len(differences) - len(seen),
        clear_wins=sum(above and known for above, known in seen),
        clear_losses=sum(not above and known for above, known in seen),
    )
