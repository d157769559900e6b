"""How often the tests of a study find a difference where there is none: python -m tests.study.false_alarms

Prints the tables of docs/studies.md: differences of two arms on tasks x training seeds x fine-tuning seeds, in units of
the deviation that fine-tuning seeds give a single difference. One-sided tests at 5%.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from scipy import stats

from megatron_detour.study.statistics import compare

LEVEL = 0.05
TASKS, FINETUNINGS = 6, 3
OWN = 0.5  # deviation over training seeds that each task has for itself
SHARED = (0.0, 0.2, 0.5, 1.0, 2.0)  # deviation over training seeds that tasks share
RESAMPLES = 499


def differences(
    rng: np.random.Generator,
    training_seeds: int,
    shared: float,
    *,
    mean: float = 0.0,
    of_tasks: float = 0.0,
    of_finetuning_seeds: float = 0.0,
) -> np.ndarray:
    """Differences [TASKS, training seeds, FINETUNINGS] of two arms. `of_tasks` is how much true differences vary;
    `of_finetuning_seeds` how much a fine-tuning seed favors an arm on a task, whatever the training seed."""
    found = mean + rng.normal(0, 1, (TASKS, training_seeds, FINETUNINGS))
    found += rng.normal(0, OWN, (TASKS, training_seeds, 1)) + rng.normal(0, shared, (1, training_seeds, 1))
    return found + rng.normal(0, of_tasks, (TASKS, 1, 1)) + rng.normal(0, of_finetuning_seeds, (TASKS, 1, FINETUNINGS))


def p_of(method: str, difference: np.ndarray, **settings) -> float:
    return compare(difference / 2, -difference / 2, method, resamples=RESAMPLES, **settings).p_above


def p_mixed(difference: np.ndarray) -> float:
    """What a mixed model does (REML of balanced data, Satterthwaite's degrees): where training seeds vary less than
    cells let expect, it sets their variance to 0 and pools both mean squares. Not used: see docs/studies.md."""
    tasks, seeds, _ = difference.shape
    means = difference.mean(2)
    of_seeds = tasks * means.mean(0).var(ddof=1)
    rest = means - means.mean(0) - means.mean(1, keepdims=True) + means.mean()
    of_cells = (rest**2).sum() / ((tasks - 1) * (seeds - 1))
    square, df = of_seeds, seeds - 1
    if of_seeds < of_cells:
        square, df = (of_seeds + (tasks - 1) * of_cells) / tasks, tasks * (seeds - 1)
    return float(stats.t.sf(means.mean() / (square / tasks / seeds) ** 0.5, df))


TESTS: dict[str, Callable[[np.ndarray], float]] = {
    "bootstrap": partial(p_of, "bootstrap"),
    "mixed model": p_mixed,
    "hierarchical": partial(p_of, "hierarchical"),
}


def rate(test: Callable[[np.ndarray], float], trials: int, training_seeds: int, shared: float, **settings) -> float:
    """The fraction of made-up studies in which the test says that arm a is better."""
    rng = np.random.default_rng([training_seeds, int(100 * shared)])
    drawn = (differences(rng, training_seeds, shared, **settings) for _ in range(trials))
    return float(np.mean([test(each) < LEVEL for each in drawn]))


def rows(trials: int) -> Iterator[tuple[str, list[float]]]:
    other_tasks = partial(p_of, "hierarchical", tasks="random")
    for seeds in (2, 3, 5):
        for shared in SHARED:
            count = partial(rate, trials=trials, training_seeds=seeds, shared=shared)
            error = ((shared**2 + (OWN**2 + 1 / FINETUNINGS) / TASKS) / seeds) ** 0.5
            false = [count(test) for test in TESTS.values()]
            false += [count(TESTS["hierarchical"], of_finetuning_seeds=0.5)]
            false += [count(other_tasks, of_tasks=of_tasks) for of_tasks in (0.3, 2.0)]
            found = [count(TESTS[name], mean=4 * error) for name in ("mixed model", "hierarchical")]
            yield f"{seeds} | {shared:g}", false + found


def main(trials: int = 2000) -> None:
    heads = ["training seeds", "shared luck", *TESTS, "fine-tuning seeds favor an arm"]
    heads += ["random tasks, alike", "random tasks, unlike", "found: mixed model", "found: hierarchical"]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|", flush=True)
    for name, rates in rows(trials):
        print(f"| {name} | {' | '.join(f'{each:.1%}' for each in rates)} |", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
