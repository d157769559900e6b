"""Tests of differences between models: Student's t, bootstrap, permutation test, Holm's correction.

Scores are fractions. Every difference is a - b, positive if a is better; every p is two-sided unless named otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.05  # significance level; intervals cover 1 - LEVEL
TIE = 0.0005  # differences below 0.05 points are invisible in a table with one decimal
_ROUNDING = 1e-12  # mathematically equal differences may differ by this much in floating point
_CHUNK = 4_000_000  # numbers in memory at once
_EXACT_IN_SINGLE = 2**24


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error (above 0), whose square has `df` degrees of freedom: Student's t."""

    mean: float
    error: float
    df: float

    def margin(self, tail: float) -> float:
        """Return how far the mean lies from the bound beyond which the true value is with probability `tail`."""
        from scipy.stats import t

        return float(t.ppf(1 - tail, self.df)) * self.error

    def p(self, than: float = 0.0) -> float:
        """Return the two-sided p of the claim that the true value is not `than`."""
        from scipy.stats import t

        return float(2 * t.sf(abs(self.mean - than) / self.error, self.df))


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (n - 1) of `count` values; sd is None for a single value."""

    mean: float
    sd: float | None
    count: int

    @classmethod
    def from_values(cls, values: Sequence[float]) -> Spread:
        array = np.asarray(values, dtype=np.float64)
        if not len(array):
            raise ValueError("no values to take the mean of")
        return cls(float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else None, len(array))

    def half(self, comparisons: int = 1) -> float | None:
        """Return half the width of the mean's 95% interval by Student's t (2.5 sd for 3 values). None for a single
        value, and if all are equal, since their variance is unknown.

        With several `comparisons`, Bonferroni's interval: a smaller mean could not differ clearly from 0.
        """
        estimate = self.estimate()
        return None if estimate is None else estimate.margin(LEVEL / comparisons / 2)

    def estimate(self) -> Estimate | None:
        """Return the mean for Student's t, or None where `half` does."""
        if self.sd is None or self.sd <= _ROUNDING:
            return None
        return Estimate(self.mean, self.sd / self.count**0.5, self.count - 1)

    def interval(self) -> tuple[float, float] | None:
        half = self.half()
        return None if half is None else (self.mean - half, self.mean + half)

    def p(self) -> float | None:
        """Return p of Student's t test that the mean is 0; below 0.05 exactly if the interval excludes 0.

        None for a single value; 1 if all are equal.
        """
        if self.sd is None:
            return None
        estimate = self.estimate()
        return 1.0 if estimate is None else estimate.p()


@dataclass(frozen=True)
class Comparison:
    """A mean difference with its 95% interval and p by one method; p is below 0.05 exactly if the interval excludes 0.

    `units` is the number of cells or tasks compared. With a single unit, or if all differences are equal, their
    variance is unknown: there is no interval, and p is 1.
    """

    mean: float
    low: float | None
    high: float | None
    p: float
    units: int


def paired_bootstrap(a: np.ndarray, b: np.ndarray, resamples: int = 10_000, seed: int = 0) -> Comparison:
    """Compare two models by their scores [tasks, seeds], NaN for missing cells, whose pairs are skipped.

    Resamples (task, seed) cells with replacement, as in arXiv 2605.12438 ("paired bootstrap over tasks x seeds"). The
    seeds of a task are not independent; over_tasks tells whether a model would be better on other tasks of this kind.

    Percentile intervals of n cells are too narrow by the width of the t distribution and by sqrt((n - 1) / n), so the
    resampled means are stretched about their mean accordingly: by 2% for 72 cells, by 43% for six, where the false
    positive rate would otherwise be 14%. p is twice the smaller fraction of them on either side of 0, with one added to
    numerator and denominator, so that p is never 0. Raises ValueError if there is no pair.
    """
    difference = _differences(a, b)
    cells = difference[~np.isnan(difference)]
    mean, count = float(cells.mean()), len(cells)
    means = bootstrap_means(cells, resamples, seed)
    if means is None:
        return Comparison(mean, None, None, 1.0, count)
    means = mean + _stretch(count) * (means - mean)
    return Comparison(mean, *bootstrap_bounds(means, LEVEL / 2), min(1.0, 2 * min(bootstrap_p(means))), count)


def over_tasks(a: np.ndarray, b: np.ndarray) -> Comparison:
    """Compare two models like paired_bootstrap, but by Student's t over the tasks' mean differences.

    This tests whether a model would be better on other tasks of this kind.
    """
    difference = _differences(a, b)
    difference = difference[~np.isnan(difference).all(1)]
    spread = Spread.from_values(list(np.nanmean(difference, axis=1)))
    low, high = spread.interval() or (None, None)
    return Comparison(spread.mean, low, high, 1.0 if low is None else spread.p(), spread.count)


def _differences(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    if difference.ndim != 2:
        raise ValueError(f"scores must be [tasks, seeds], not {difference.ndim}-dimensional")
    if np.isnan(difference).all():
        raise ValueError("the models have no common cell")
    return difference


def bootstrap_means(values: np.ndarray, resamples: int = 10_000, seed: int = 0) -> np.ndarray | None:
    """Return the means [resamples] of values [n] drawn with replacement, sorted; None if all values are equal."""
    return None if np.ptp(values) <= _ROUNDING else np.sort(_resampled_means(values, resamples, seed))


def bootstrap_p(means: np.ndarray) -> tuple[float, float]:
    """Return the one-sided p of the claims that the true mean is above 0 and below 0, never 0 themselves."""
    below, above = int((means <= _ROUNDING).sum()), int((means >= -_ROUNDING).sum())
    return (below + 1) / (len(means) + 1), (above + 1) / (len(means) + 1)


def bootstrap_bounds(means: np.ndarray, tail: float) -> tuple[float, float]:
    """Return the bounds of sorted means that leave out 0 exactly if the one-sided p is below `tail`."""
    end = max(0, math.ceil(tail * (len(means) + 1)) - 2)  # at most this many means beyond 0 keep p below `tail`
    return float(means[end]), float(means[-1 - end])


def _stretch(count: int) -> float:
    from scipy.stats import norm, t

    return float(t.ppf(1 - LEVEL / 2, count - 1) / norm.ppf(1 - LEVEL / 2)) * (count / (count - 1)) ** 0.5


def _resampled_means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Return the means [resamples] of values drawn with replacement."""
    rng, count = np.random.default_rng(seed), len(values)
    rows, means = max(1, _CHUNK // count), []
    for start in range(0, resamples, rows):
        means.append(values[rng.integers(0, count, (min(rows, resamples - start), count))].mean(1))
    return np.concatenate(means)


@dataclass(frozen=True)
class Permutation:
    """A difference of scores on one task with p by permutation test."""

    difference: float
    p: float


def permutation_test(
    a: np.ndarray,
    b: np.ndarray,
    score: Callable[[np.ndarray], np.ndarray],
    permutations: int = 10_000,
    seed: int = 0,
) -> Permutation:
    """Compare two models on the same test examples, by each example's contribution to the score [seeds, n, k].

    `score` maps totals [..., k] to scores [...] (Metric.from_totals). Each permutation swaps the two models on a random
    half of the examples, in all seeds at once; the statistic is the difference of the mean scores over seeds. p is the
    fraction of permutations, including the identity, whose difference is at least as large in absolute value.

    The test conditions on the fine-tuned models: it tells whether the difference would hold on other examples of this
    kind, not with other seeds. Source: approximate randomization (Noreen 1989; Yeh 2000).
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.ndim != 3 or a.shape != b.shape:
        raise ValueError(f"contributions must both be [seeds, n, k], not {a.shape} and {b.shape}")
    totals_a, totals_b = (each.sum(1, dtype=np.float64) for each in (a, b))
    observed = float((score(totals_a) - score(totals_b)).mean())
    seeds, _, width = a.shape
    # Where the models agree a swap changes nothing: skip those examples and columns.
    moved = (a != b).any((0, 2))
    change = (b[:, moved].astype(np.float64) - a[:, moved]).transpose(1, 0, 2).reshape(-1, seeds * width)
    columns = change.any(0)
    change = _single_if_exact(change[:, columns])
    rng, differences = np.random.default_rng(seed), []
    rows = max(1, _CHUNK // (len(change) + 8 * seeds * width))
    for start in range(0, permutations, rows):
        swaps = _coins(rng, min(rows, permutations - start), len(change)).astype(change.dtype)
        shift = np.zeros((len(swaps), seeds * width))
        shift[:, columns] = swaps @ change
        shift = shift.reshape(-1, seeds, width)
        differences.append((score(totals_a + shift) - score(totals_b - shift)).mean(-1))
    differences = np.concatenate(differences)
    count = 1 + int((np.abs(differences) >= abs(observed) - _ROUNDING).sum())
    return Permutation(observed, count / (permutations + 1))


def _coins(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Return random zeros and ones [rows, columns]."""
    width = -(-columns // 8)
    drawn = np.frombuffer(rng.bytes(rows * width), dtype=np.uint8).reshape(rows, width)
    return np.unpackbits(drawn, axis=1, count=columns)


def _single_if_exact(change: np.ndarray) -> np.ndarray:
    """Convert counts to single precision, where sums are still exact and twice as fast."""
    whole = (change == np.rint(change)).all() and np.abs(change).sum(0).max(initial=0) < _EXACT_IN_SINGLE
    return change.astype(np.float32) if whole else change


def holm(p_values: Iterable[float], families: int = 1) -> list[float]:
    """Correct p values for multiple comparisons, keeping their order (Holm 1979).

    This bounds the family-wise error rate by the level. With several `families` of comparisons, each gets an equal part
    of the level (Bonferroni), so that the bound holds for all of them together.
    """
    p = np.asarray(list(p_values), dtype=np.float64)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(families * stepped, 1.0)
    return corrected.tolist()


def greater_p(p_examples: float | None, p_seeds: float | None) -> float | None:
    """Return the greater p of the test over examples and the test over seeds, so that a difference must pass both.

    The permutation test alone is not enough: on a large test split, two sets of seeds of the very same model differ
    "significantly" (shown in tests/evaluation/test_statistics.py).
    """
    return None if p_examples is None or p_seeds is None else max(p_examples, p_seeds)


@dataclass(frozen=True)
class Tally:
    """The number of tasks on which a model is better, worse, or within `TIE`, and clearly better or worse."""

    wins: int
    losses: int
    ties: int
    clear_wins: int
    clear_losses: int


def tally(differences: Sequence[float], clear: Sequence[bool]) -> Tally:
    """Count mean differences [tasks]; `clear` marks those that are significant."""
    seen = [(d > 0, s) for d, s in zip(differences, clear, strict=True) if abs(d) >= TIE]
    return Tally(
        wins=sum(above for above, _ in seen),
        losses=sum(not above for above, _ in seen),
        ties=len(differences) - len(seen),
        clear_wins=sum(above and known for above, known in seen),
        clear_losses=sum(not above and known for above, known in seen),
    )
