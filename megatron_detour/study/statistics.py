"""Tests of a study's criteria: one arm of pretraining against another, or a quantity against a number.

Scores of an arm are [tasks, training seeds, fine-tuning seeds], fractions, NaN where missing. Arms are paired: the same
training seed means the same start and data order, the same fine-tuning seed the same head and order of examples.
Differences are a - b, positive if a is better. docs/studies.md tells what each test assumes and how often it errs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement
from typing import Literal

import numpy as np

from megatron_detour.errors import DetourError
from megatron_detour.evaluation.report.statistics import (
    LEVEL,
    Estimate,
    Spread,
    bootstrap_bounds,
    bootstrap_means,
    bootstrap_p,
    holm,
)

Method = Literal["hierarchical", "finetuning", "bootstrap"]
Tasks = Literal["fixed", "random"]
Direction = Literal["above", "not above"]
_EQUAL = 1e-12  # mathematically equal differences may differ by this much in floating point


@dataclass(frozen=True)
class Comparison:
    """A mean difference (or mean, or ratio) tested against `than`; scores and differences are fractions.

    `low` and `high` bound the two-sided interval of confidence 1 - `level`: it excludes `than` exactly if `p` is below
    `level`. `at_least` and `at_most` are one-sided bounds of this confidence: `at_least` is above `than` exactly if
    `p_above` is below `level`.
    If the variance is unknown (a single training seed, or equal values), there are no bounds, and both p are 1.

    `tasks`, `training_seeds` and `cells` (pairs of scores) count what was used.
    """

    method: str
    mean: float
    low: float | None
    high: float | None
    at_least: float | None
    at_most: float | None
    p: float
    p_above: float
    level: float
    than: float
    tasks: int
    training_seeds: int
    cells: int


@dataclass(frozen=True)
class Verdict:
    """Whether a criterion is met, and the p that decided it."""

    met: bool
    p: float


def compare(
    a: np.ndarray,
    b: np.ndarray,
    method: Method = "hierarchical",
    *,
    tasks: Tasks = "fixed",
    level: float = LEVEL,
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Test whether arm a scores higher than arm b on the mean of tasks.

    hierarchical: would it with other training seeds? Student's t over the paired mean differences of the training
    seeds; fine-tuning seeds and tasks only make these means more precise. With `tasks="random"`: and on other tasks of
    this kind? The widest of Student's t over training seeds, over tasks, and over the sum of both variances. If an
    arm has the same scores for all training seeds (the start model), the luck of its fine-tuning is added.

    finetuning: are these very models better, whatever the luck of fine-tuning? The only question that a single training
    seed can answer. Variance within cells of a task and training seed, pooled by Satterthwaite (1946).

    bootstrap: percentile interval of the mean of cells drawn with replacement, as in arXiv 2605.12438 ("paired
    bootstrap over tasks x seeds"). It takes cells for independent and finds too much if training seeds differ.

    The first two compare the largest block of tasks x training seeds without a gap, so that no missing score shifts the
    mean: each needs one pair of fine-tuning seeds ("finetuning": two). Raises DetourError if there is no pair.
    """
    difference = _differences(a, b)
    if method == "bootstrap":
        return _bootstrap(difference, level, resamples, seed)
    return _by_variance(a, b, difference, method, tasks, level)


def _by_variance(
    a: np.ndarray, b: np.ndarray, difference: np.ndarray, method: Method, tasks: Tasks, level: float
) -> Comparison:
    count = (~np.isnan(difference)).sum(2)
    rows, columns = complete_block(count >= (2 if method == "finetuning" else 1))
    if not len(rows):
        raise DetourError("no training seed has two pairs of fine-tuning seeds; use the test `hierarchical`")
    whole = np.ix_(rows, columns)
    block = difference[whole]
    means = np.nanmean(block, axis=2)
    if method == "finetuning":
        estimates = [_within_cells(block)]
    else:
        single = [arm[whole] for arm in map(np.asarray, (a, b)) if _is_one_model(arm[whole])]
        estimates = _over_seeds_and_tasks(means, tasks, [_within_cells(arm[:, :1]) for arm in single])
    used = {"tasks": len(rows), "training_seeds": len(columns), "cells": int((~np.isnan(block)).sum())}
    return _student(method, float(means.mean()), estimates, level, **used)


def compare_values(
    a: Sequence[float],
    b: Sequence[float] | None = None,
    *,
    than: float | None = None,
    log: bool = False,
    level: float = LEVEL,
) -> Comparison:
    """Test whether one number per training seed (a drift ratio, a loss, a probe's accuracy) is above a number.

    With `b`, paired by training seed: whether a - b is above `than` (0), or with `log`, a / b above `than` (1). Without
    `b`, whether a itself is. Student's t over the training seeds; `log` compares logarithms, for ratios, so that mean
    and interval are of geometric means. NaN leaves out a seed. Raises DetourError without a value, and if a value
    is not above 0 where logarithms are taken.
    """
    than = float(log) if than is None else than
    values = _numbers(a, log) - (0.0 if b is None else _numbers(b, log))
    values = values[~np.isnan(values)]
    if not len(values):
        raise DetourError("no training seed has the values to compare")
    spread = Spread.from_values(list(values))
    used = {"tasks": 0, "training_seeds": len(values), "cells": len(values)}
    test = _student("values", spread.mean, [spread.estimate()], level, float(_numbers([than], log)[0]), **used)
    if not log:
        return test
    powers = {name: getattr(test, name) for name in ("mean", "low", "high", "at_least", "at_most")}
    return replace(test, than=than, **{name: None if x is None else math.exp(x) for name, x in powers.items()})


def verdicts(criteria: Sequence[tuple[Comparison, Direction]], unjudged: int = 0) -> list[Verdict]:
    """Judge a study's criteria together, each at the level of its comparison.

    `unjudged` are further criteria "above" that lack results: they were registered, so Holm counts them too.

    "above" is met if its p, corrected by Holm over all criteria of this direction, is below the level. "not above" is
    met if its own p is not: a correction would make that easier to meet. It is weak evidence, as a small study meets it
    too: `at_most` tells which difference remains possible.
    """
    claims = [comparison.p_above for comparison, direction in criteria if direction == "above"]
    corrected = iter(holm([*claims, *[1.0] * unjudged]))
    result = []
    for comparison, direction in criteria:
        p = next(corrected) if direction == "above" else comparison.p_above
        result.append(Verdict((p < comparison.level) == (direction == "above"), p))
    return result


def complete_block(present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the tasks and training seeds, as indices, of the largest block of `present` [tasks, seeds] without a gap.

    It depends on which cells exist, never on their values. Of blocks of one size, the one with more training seeds.
    """
    patterns = np.unique(present[present.any(1)], axis=0)
    shared = [x & y for x, y in combinations_with_replacement(patterns, 2)]
    blocks = [((present | ~seeds).all(1).sum() * seeds.sum(), seeds.sum(), seeds) for seeds in shared if seeds.any()]
    if not blocks:
        return np.empty(0, int), np.empty(0, int)
    *_, seeds = max(blocks, key=lambda block: block[:2])
    return np.flatnonzero((present | ~seeds).all(1)), np.flatnonzero(seeds)


def _differences(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    if difference.ndim != 3:
        raise ValueError(f"scores must be [tasks, training seeds, fine-tuning seeds], not {difference.shape}")
    if np.isnan(difference).all():
        raise DetourError("the two arms have no task, training seed and fine-tuning seed in common")
    return difference


def _is_one_model(scores: np.ndarray) -> bool:
    return scores.shape[1] > 1 and np.array_equal(scores, np.repeat(scores[:, :1], scores.shape[1], 1), equal_nan=True)


def _over_seeds_and_tasks(
    means: np.ndarray, tasks: Tasks, shared: Sequence[Estimate | None] = ()
) -> list[Estimate | None]:
    """Return the estimates, of which the widest counts, by the mean differences [tasks, training seeds].

    The errors of `shared` move all training seeds alike, so that the variance over seeds does not show them.
    """
    estimates = [Spread.from_values(list(means.mean(0))).estimate()]
    if shared:
        estimates.append(_sum([*estimates, *shared]))
    if tasks == "random":
        # The sum counts the noise of single cells twice, which keeps it honest where one of its parts has few degrees.
        over_tasks = Spread.from_values(list(means.mean(1))).estimate()
        estimates += [over_tasks, _sum([estimates[-1], over_tasks])]
    return estimates


def _sum(parts: Sequence[Estimate | None]) -> Estimate | None:
    """Return the first mean with the independent errors of all parts; None if one is unknown."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    return _satterthwaite(known[0].mean, np.array([p.error**2 for p in known]), np.array([p.df for p in known]))


def _within_cells(block: np.ndarray) -> Estimate | None:
    """Return the mean of cells [tasks, training seeds, fine-tuning seeds] by the variance within; None without any."""
    cells = block.reshape(-1, block.shape[2])
    count = (~np.isnan(cells)).sum(1)
    if (count < 2).any():
        return None
    parts = np.nanvar(cells, axis=1, ddof=1) / count / len(cells) ** 2
    return _satterthwaite(float(np.nanmean(cells, 1).mean()), parts, count - 1)


def _satterthwaite(mean: float, variances: np.ndarray, df: np.ndarray) -> Estimate | None:
    """Return the mean with a squared error that is the sum of independent `variances` (Satterthwaite 1946)."""
    total = float(np.sum(variances))
    return Estimate(mean, total**0.5, total**2 / float(np.sum(variances**2 / df))) if total > _EQUAL else None


def _student(
    method: str, mean: float, estimates: Sequence[Estimate | None], level: float, than: float = 0.0, **used: int
) -> Comparison:
    """Return the test by the widest interval of these estimates, without bounds if one is unknown."""
    known = [estimate for estimate in estimates if estimate is not None]
    if len(known) < len(estimates):
        return Comparison(method, mean, None, None, None, None, 1.0, 1.0, level, than, **used)
    both, one = (max(estimate.margin(tail) for estimate in known) for tail in (level / 2, level))
    p = max(each.p(than) for each in known)
    p_above = p / 2 if mean > than else 1 - p / 2
    return Comparison(method, mean, mean - both, mean + both, mean - one, mean + one, p, p_above, level, than, **used)


def _bootstrap(difference: np.ndarray, level: float, resamples: int, seed: int) -> Comparison:
    found = ~np.isnan(difference)
    used = {"tasks": found.any((1, 2)).sum(), "training_seeds": found.any((0, 2)).sum(), "cells": found.sum()}
    used = {name: int(count) for name, count in used.items()}
    cells = difference[found]
    mean, means = float(cells.mean()), bootstrap_means(cells, resamples, seed)
    if means is None:
        return _student("bootstrap", mean, [None], level, **used)
    both, one = bootstrap_bounds(means, level / 2), bootstrap_bounds(means, level)
    above, below = bootstrap_p(means)
    return Comparison("bootstrap", mean, *both, *one, min(1.0, 2 * min(above, below)), above, level, 0.0, **used)


def _numbers(values: Sequence[float], log: bool) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if not log:
        return array
    if (array <= 0).any():
        raise DetourError(f"ratios are compared by their logarithms, and {array.min():g} has none")
    return np.log(array)
