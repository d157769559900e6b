"""Both kinds of luck (training seeds and fine-tuning seeds) of an arm, and the effect that a study could find."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_detour.evaluation.report.statistics import LEVEL
from megatron_detour.study.statistics import Method, Tasks, compare, complete_block

TRIALS = 2000  # simulated studies
RESAMPLES = 399


@dataclass(frozen=True)
class Luck:
    """Standard deviations of scores (fractions), None where unknown.

    `finetuning` and `training` are per task: over fine-tuning seeds of one pretrained model, and over training seeds
    without what fine-tuning adds. `shared` is the part of the training luck that moves all tasks together, `own` the
    part that is each task's own (root mean square).
    """

    finetuning: tuple[float | None, ...]
    training: tuple[float | None, ...] = ()
    shared: float | None = None
    own: float | None = None


def luck(scores: np.ndarray) -> Luck:
    """Estimate both kinds of luck from scores [tasks, training seeds, fine-tuning seeds], NaN where missing.

    Estimates are by the analysis of variance, 0 where the means vary less than fine-tuning explains. With few training
    seeds they are rough: of a true deviation of 1, three seeds show 0.2 to 1.9 in 95% of cases.
    """
    scores = np.asarray(scores, dtype=np.float64)
    count = (~np.isnan(scores)).sum(2)
    means = np.where(count > 0, np.nansum(scores, 2) / np.maximum(count, 1), np.nan)
    df = np.maximum(count - 1, 0).sum(1)
    squares = np.nansum((scores - means[:, :, None]) ** 2, axis=(1, 2))
    within = np.where(df > 0, squares / np.maximum(df, 1), np.nan)  # the variance of one fine-tuning, by task
    noise = within[:, None] / np.where(count > 0, count, np.nan)  # of the mean of a cell
    training = [
        _root(row[found].var(ddof=1) - extra[found].mean()) if found.sum() > 1 else None
        for row, extra, found in zip(means, noise, count > 0, strict=True)
    ]
    return Luck(tuple(map(_root, within)), tuple(training), *_shared_and_own(means, noise))


def _shared_and_own(means: np.ndarray, noise: np.ndarray) -> tuple[float | None, float | None]:
    """Split the variance of means [tasks, training seeds] that `noise`, their variance by fine-tuning, leaves over."""
    rows, columns = complete_block(~np.isnan(means + noise))
    block = means[np.ix_(rows, columns)]
    tasks, seeds = block.shape
    if tasks < 2 or seeds < 2:
        return None, None
    of_seeds = block.mean(0).var(ddof=1)
    rest = block - block.mean(1, keepdims=True) - block.mean(0) + block.mean()
    of_cells = (rest**2).sum() / ((tasks - 1) * (seeds - 1))
    return _root(of_seeds - of_cells / tasks), _root(of_cells - noise[np.ix_(rows, columns)].mean())


def _root(variance: float) -> float | None:
    return None if np.isnan(variance) else float(max(0.0, variance)) ** 0.5


def power(
    given: Luck,
    training_seeds: int,
    finetuning_seeds: int,
    *,
    method: Method = "hierarchical",
    tasks: Tasks = "fixed",
    task_sd: float = 0.0,
    of_differences: bool = False,
    level: float = LEVEL,
    chance: float = 0.8,
) -> float | None:
    """Return the smallest mean difference that compare(a, b, method).p_above < level would find with this `chance`.

    `given` describes the scores of an arm; with `of_differences` paired differences of two arms, whose standard
    deviations are greater by sqrt(2) if pairing does not help (assumed otherwise). It holds one `finetuning` deviation
    per task; `shared` and `own` are measured or assumed. `task_sd` is how much true differences vary between tasks,
    for `tasks="random"`. None if the test could find nothing (a single training seed).

    Noncentral t for Student's t over training seeds; otherwise 2,000 simulated studies without a difference, with a
    fixed seed, judged by `compare` itself: an effect is found if it lifts their lower bound above 0.
    """
    scale = 1.0 if of_differences else 2**0.5
    shared, own = scale * (given.shared or 0.0), scale * (given.own or 0.0)
    noise = scale * np.array([0.0 if sd is None else sd for sd in given.finetuning])
    design = len(noise), training_seeds, finetuning_seeds
    if method == "hierarchical" and tasks == "fixed":
        variance = shared**2 + own**2 / len(noise) + (noise**2).sum() / len(noise) ** 2 / finetuning_seeds
        return _by_noncentral_t(float(variance / training_seeds) ** 0.5, training_seeds - 1, level, chance)
    rng, bounds = np.random.default_rng(0), []
    for trial in range(TRIALS):
        difference = rng.normal(0, noise[:, None, None], design) + rng.normal(0, own, (*design[:2], 1))
        difference += rng.normal(0, shared, (1, training_seeds, 1)) + rng.normal(0, task_sd, (len(noise), 1, 1))
        arms = difference / 2, -difference / 2
        found = compare(*arms, method, tasks=tasks, level=level, resamples=RESAMPLES, seed=trial)
        if found.at_least is None:
            return None
        bounds.append(-found.at_least)
    return float(np.quantile(bounds, chance))


def _by_noncentral_t(error: float, df: int, level: float, chance: float) -> float | None:
    if df < 1 or not error:
        return None
    from scipy.optimize import brentq
    from scipy.stats import nct, t

    limit = t.ppf(1 - level, df)
    return error * float(brentq(lambda effect: nct.sf(limit, df, effect) - chance, 0, 10 * limit))
