"""How often an evaluation calls a difference clear where no model differs: python -m tests.evaluation.false_alarms

Prints the table of docs/evaluation.md, where 5% is meant. Over tasks: the tasks' true differences vary by 1.5 points
about 0, scores by 1 point over seeds. By task, of all tasks: no difference, but seeds that move accuracy by 2.5 points
on 300 test examples, so that a permutation test alone sees models that differ.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np

from megatron_detour.evaluation.report.statistics import (
    LEVEL,
    Spread,
    greater_p,
    holm,
    over_tasks,
    paired_bootstrap,
    permutation_test,
)

TASKS, SEEDS = (2, 3, 6, 8, 11, 20), (3, 5, 9)
OF_TASKS, OF_SEEDS = 0.015, 0.01
EXAMPLES, LUCK, PERMUTATIONS = 300, 0.13, 1999
POOL = 5  # times as many tasks as trials, of which those of a trial are drawn


def no_difference(rng: np.random.Generator, tasks: int, seeds: int, of_tasks: float) -> tuple[np.ndarray, np.ndarray]:
    """Scores [tasks, seeds] of two models whose tasks' differences have this deviation and a mean of 0."""
    a, b = rng.normal(0.6, OF_SEEDS / 2**0.5, (2, tasks, seeds))
    return a + rng.normal(0, of_tasks, (tasks, 1)), b


def alarms(compare: Callable, tasks: int, seeds: int, of_tasks: float, trials: int) -> tuple[float, bool]:
    """The share of trials with p below LEVEL, and whether the interval leaves out 0 in exactly these."""
    rng, found, agree = np.random.default_rng(tasks * 100 + seeds), 0, True
    for _ in range(trials):
        compared = compare(*no_difference(rng, tasks, seeds, of_tasks))
        out = compared.low is not None and not compared.low <= 0 <= compared.high
        found += compared.p < LEVEL
        agree &= out == (compared.p < LEVEL)
    return found / trials, agree


def accuracy(totals: np.ndarray) -> np.ndarray:
    return totals[..., 0] / totals[..., 1]


def one_task(rng: np.random.Generator, seeds: int) -> tuple[float, float, float]:
    """Both p and the mean difference of a task on which two lots of fine-tunings of one model are compared."""
    difficulty = rng.normal(0, 1, EXAMPLES)
    models = []
    for _ in range(2):
        skill = 1.2 + rng.normal(0, LUCK, (seeds, 1))
        right = (skill + difficulty + rng.normal(0, 0.7, (seeds, EXAMPLES)) > 0).astype(np.float64)
        models.append(np.stack([right, np.ones_like(right)], -1))
    p = permutation_test(*models, accuracy, PERMUTATIONS, seed=int(rng.integers(2**31))).p
    spread = Spread.from_values(list(accuracy(models[0].sum(1)) - accuracy(models[1].sum(1))))
    return p, spread.p(), spread.mean


def families(
    pool: list[tuple[float, float, float]], tasks: int, trials: int, rng: np.random.Generator
) -> tuple[float, float, float]:
    """The shares of evaluations of `tasks` tasks, drawn from `pool`, that call something clear: of single tasks alone,
    of single tasks or their mean at 5% each, and of either as the report corrects them."""
    found = np.zeros((trials, 3), dtype=bool)
    for trial in range(trials):
        drawn = [pool[i] for i in rng.choice(len(pool), tasks, replace=False)]
        least = min(holm(greater_p(*p_values) for *p_values, _ in drawn))
        means = np.array([[mean] for *_, mean in drawn])
        either = min(least, over_tasks(means, np.zeros_like(means)).p)
        found[trial] = least < LEVEL, either < LEVEL, 2 * either < LEVEL
    return tuple(found.mean(0))


def main(trials: int = 2000) -> None:
    heads = ["tasks x seeds", "p, tasks", "p, cells, tasks alike", "p, cells, tasks differ", "any task clear"]
    heads += ["any task or the mean, 5% each", "any task or the mean clear"]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|", flush=True)
    rng = np.random.default_rng(0)
    pools = {seeds: [one_task(rng, seeds) for _ in range(POOL * trials)] for seeds in SEEDS}
    for tasks in TASKS:
        for seeds in SEEDS:
            rates = [
                alarms(over_tasks, tasks, seeds, OF_TASKS, trials)[0],
                alarms(lambda a, b: paired_bootstrap(a, b, 999), tasks, seeds, 0, trials)[0],
                alarms(lambda a, b: paired_bootstrap(a, b, 999), tasks, seeds, OF_TASKS, trials)[0],
                *families(pools[seeds], tasks, trials, rng),
            ]
            print(f"| {tasks} x {seeds} | {' | '.join(f'{rate:.1%}' for rate in rates)} |", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
