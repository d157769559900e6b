"""Statistics: checked on made-up results with known answers, by hand and against scipy."""

from __future__ import annotations

import itertools
import tracemalloc
from functools import partial

import numpy as np
import pytest
from scipy import stats

from megatron_detour.evaluation.report import statistics
from megatron_detour.evaluation.report.statistics import (
    Comparison,
    Spread,
    greater_p,
    holm,
    over_tasks,
    paired_bootstrap,
    permutation_test,
    tally,
)
from tests.evaluation import false_alarms

DATA_SETS = 400  # of made-up results, where p must be uniform


def accuracy(totals: np.ndarray) -> np.ndarray:
    """Of contributions (right, 1)."""
    return totals[..., 0] / totals[..., 1]


def f1(totals: np.ndarray) -> np.ndarray:
    return 2 * totals[..., 0] / np.maximum(totals[..., 1] + totals[..., 2], 1)


def right(answers: list[list[int]] | np.ndarray) -> np.ndarray:
    """Right answers [seeds, n] as contributions [seeds, n, 2]."""
    answers = np.asarray(answers, dtype=np.float64)
    return np.stack([answers, np.ones_like(answers)], -1)


def total(totals: np.ndarray) -> np.ndarray:
    return totals[..., 0]


def uniform(p_values: list[float]) -> float:
    """The p of a Kolmogorov-Smirnov test that these are uniform."""
    return float(stats.kstest(p_values, "uniform").pvalue)


# ------------------------------------------------------------------------------------------------ means over seeds


def test_mean_and_deviation_over_seeds():
    found = Spread.from_values([0.5, 0.7])
    assert found.mean == pytest.approx(0.6) and found.count == 2
    assert found.sd == pytest.approx(0.02**0.5)  # n - 1
    assert Spread.from_values([0.4]) == Spread(0.4, None, 1) and Spread.from_values([0.4]).interval() is None


def test_interval_over_seeds_is_students():
    values = [0.61, 0.64, 0.60, 0.66, 0.62]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert Spread.from_values(values).interval() == pytest.approx((expected.low, expected.high))
    low, high = Spread.from_values([-1.0, 0.0, 1.0]).interval()  # what the docs say of three seeds
    assert high == -low == pytest.approx(2.484, abs=1e-3)


def test_no_values_have_no_mean():
    with pytest.raises(ValueError, match="no values"):
        Spread.from_values([])


# ------------------------------------------------------------------------------------------------ bootstrap


def of_seeds(a: np.ndarray, b: np.ndarray) -> Comparison:
    """What the report says of a task's seeds."""
    spread = Spread.from_values((a - b).ravel())
    return Comparison(spread.mean, *(spread.interval() or (None, None)), spread.p(), spread.count)


@pytest.mark.parametrize("compare", [over_tasks, paired_bootstrap, of_seeds])
@pytest.mark.parametrize("difference", [0.25, 0.1, 0.0])
@pytest.mark.parametrize("shape", [(2, 1), (3, 1), (4, 5)])
def test_differences_that_do_not_vary_show_nothing(compare, difference, shape):
    found = compare(np.full(shape, 0.5 + difference), np.full(shape, 0.5))
    assert found.mean == pytest.approx(difference)
    assert (found.low, found.high, found.p) == (None, None, 1.0)


def test_bootstrap_counts_both_sides_by_hand():
    """Of two cells, -1 and +3, the mean of two draws is -1, +1, +1 or +3: a quarter is below 0."""
    a, b = np.array([[0.0, 4.0]]), np.array([[1.0, 1.0]])
    resamples = 20_000
    drawn = np.random.default_rng(7).integers(0, 2, (resamples, 2))
    below = (drawn == 0).all(1).sum()
    found = paired_bootstrap(a, b, resamples, seed=7)
    assert found.p == 2 * (below + 1) / (resamples + 1) and abs(found.p - 0.5) < 0.02
    wide = 2 * stats.t.ppf(0.975, 1) / stats.norm.ppf(0.975) * 2**0.5  # the stretch of two cells
    assert (found.mean, found.low, found.high) == pytest.approx((1.0, 1 - wide, 1 + wide))


def test_bootstrap_p_is_uniform_without_a_difference():
    rng = np.random.default_rng(0)
    found = [
        paired_bootstrap(*rng.normal(0.6, 0.02, (2, 10, 5)), resamples=400, seed=number).p
        for number in range(DATA_SETS)
    ]
    assert uniform(found) > 0.05


def test_tasks_are_uniform_where_cells_are_not():
    """Seeds that share their task's difference are no independent cells: the paper's bootstrap finds too much."""
    rng = np.random.default_rng(1)
    cells, tasks = [], []
    for number in range(DATA_SETS):
        a = rng.normal(0, 0.02, (30, 1)) + rng.normal(0, 0.005, (30, 4))
        b = np.zeros((30, 4))
        cells.append(paired_bootstrap(a, b, resamples=400, seed=number).p)
        tasks.append(over_tasks(a, b).p)
    assert uniform(tasks) > 0.05
    assert uniform(cells) < 1e-6
    assert np.mean(np.array(cells) < 0.05) > 0.2


@pytest.mark.parametrize("compare", [over_tasks, partial(paired_bootstrap, resamples=199)], ids=["tasks", "cells"])
@pytest.mark.parametrize("tasks", false_alarms.TASKS)
@pytest.mark.parametrize("seeds", false_alarms.SEEDS)
def test_five_percent_find_something_in_nothing_and_p_says_what_the_interval_says(compare, tasks, seeds):
    rate, agree = false_alarms.alarms(compare, tasks, seeds, 0.0, DATA_SETS)
    assert 0.015 < rate < 0.095 and agree


def test_the_eight_means_of_the_report():
    """The bootstrap of whole tasks gave 0.045 beside an interval from -0.1 to 0.9."""
    means = np.array([1.2, 0.9, -0.3, 0.9, -0.2, 0.8, 0.3, -0.3])[:, None]
    found = over_tasks(means, np.zeros_like(means))
    assert found.p == pytest.approx(stats.ttest_1samp(means[:, 0], 0).pvalue) and found.p == pytest.approx(
        0.1, abs=0.01
    )
    assert found.low < 0 < found.high


def test_bootstrap_finds_a_shift_of_one_standard_deviation():
    rng = np.random.default_rng(2)
    b = rng.normal(0.6, 0.02, (8, 9))
    a = rng.normal(0.6, 0.02, (8, 9)) + 0.02
    for compare in (paired_bootstrap, over_tasks):
        found = compare(a, b)
        assert found.p < 0.01 and 0.01 < found.mean < 0.03 and found.low > 0


@pytest.mark.parametrize("compare", [over_tasks, paired_bootstrap])
def test_comparisons_are_antisymmetric(compare):
    a, b = np.random.default_rng(3).normal(0.6, 0.02, (2, 6, 3))
    there, back = compare(a, b), compare(b, a)
    assert back.p == there.p
    assert (back.mean, back.low, back.high) == pytest.approx((-there.mean, -there.high, -there.low))


def test_bootstrap_interval_agrees_with_scipy():
    a, b = np.random.default_rng(4).normal(0.6, 0.02, (2, 8, 9))
    own = paired_bootstrap(a, b, 20_000)
    other = stats.bootstrap(
        ((a - b).ravel(),), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(0)
    ).confidence_interval
    assert (own.low, own.high) == pytest.approx((other.low, other.high), abs=0.05 * (other.high - other.low))


def test_the_interval_over_tasks_is_student_s():
    a, b = np.random.default_rng(4).normal(0.6, 0.02, (2, 8, 9))
    tasks = (a - b).mean(1)
    own = over_tasks(a, b)
    assert (own.low, own.high) == pytest.approx(stats.ttest_1samp(tasks, 0).confidence_interval(0.95))
    assert own.p == pytest.approx(stats.ttest_1samp(tasks, 0).pvalue)


@pytest.mark.parametrize("compare", [over_tasks, paired_bootstrap])
def test_one_unit_shows_nothing(compare):
    alone = compare(np.array([[0.9]]), np.array([[0.1]]))
    assert (alone.mean, alone.low, alone.high, alone.p) == (pytest.approx(0.8), None, None, 1.0)


def test_missing_cells_leave_out_their_pair():
    a = np.array([[0.5, np.nan], [0.9, 0.8], [np.nan, np.nan]])
    b = np.array([[0.4, 0.4], [0.5, np.nan], [0.1, 0.1]])
    cells = paired_bootstrap(a, b, 100)
    assert cells.mean == pytest.approx((0.1 + 0.4) / 2) and cells.units == 2
    assert over_tasks(a, b).units == 2
    with pytest.raises(ValueError, match="no common cell"):
        paired_bootstrap(a, np.full((3, 2), np.nan))
    with pytest.raises(ValueError, match="not 1-dimensional"):
        paired_bootstrap(np.zeros(3), np.zeros(3))


def test_bootstrap_in_chunks_is_the_same(monkeypatch):
    a, b = np.random.default_rng(6).normal(0.6, 0.02, (2, 4, 3))
    whole = paired_bootstrap(a, b, 500)
    monkeypatch.setattr(statistics, "_CHUNK", 100)
    assert paired_bootstrap(a, b, 500) == whole


# ------------------------------------------------------------------------------------------------ permutation test


def test_permutation_test_of_equal_models():
    same = right([[1, 0, 1], [1, 1, 0]])
    found = permutation_test(same, same, accuracy, 100)
    assert (found.difference, found.p) == (0.0, 1.0)


def test_permutation_test_by_hand():
    """Two examples on which a is right and b is wrong: of four swaps two keep the difference's size."""
    a, b = right([[1, 1, 1]]), right([[0, 0, 1]])
    found = permutation_test(a, b, accuracy, 40_000)
    assert found.difference == pytest.approx(2 / 3)
    assert found.p == pytest.approx(0.5, abs=0.01)
    five = permutation_test(right([[1] * 5]), right([[0] * 5]), accuracy, 40_000)
    assert five.difference == 1 and five.p == pytest.approx(2 / 32, abs=0.005)


def test_permutation_p_is_never_zero():
    n = 200
    found = permutation_test(right([[1] * n]), right([[0] * n]), accuracy, 99)
    assert found.p == 1 / 100


def test_an_example_is_swapped_in_all_seeds_at_once():
    """One example decides in all of 8 seeds: were seeds swapped one by one, p would be 2 / 2^8."""
    a, b = right([[1]] * 8), right([[0]] * 8)
    assert permutation_test(a, b, accuracy, 1000).p == 1.0


def test_permutation_test_agrees_with_scipy_on_accuracy():
    rng = np.random.default_rng(0)
    a, b = (rng.random(12) < 0.8).astype(float), (rng.random(12) < 0.4).astype(float)
    exact = stats.permutation_test(
        (a, b), lambda x, y, axis: x.mean(axis) - y.mean(axis), permutation_type="samples", vectorized=True
    )
    found = permutation_test(right([a]), right([b]), accuracy, 40_000)
    assert 0.01 < exact.pvalue < 0.5
    assert found.difference == pytest.approx(exact.statistic)
    assert found.p == pytest.approx(exact.pvalue, abs=0.01)


def test_permutation_test_of_f1_agrees_with_all_swaps():
    """F1 is no mean over examples: every swap of 6 examples in 3 seeds, by plain loops."""
    rng = np.random.default_rng(1)
    gold = rng.integers(1, 4, 6)
    a, b = (
        np.stack([[[min(g, p), p, g] for g, p in zip(gold, rng.integers(0, 5, 6), strict=True)] for _ in range(3)])
        for _ in range(2)
    )

    def difference(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.mean([f1(x[s].sum(0)) - f1(y[s].sum(0)) for s in range(3)]))

    observed, found = difference(a, b), []
    for swaps in itertools.product([False, True], repeat=6):
        which = np.array(swaps)[None, :, None]
        found.append(difference(np.where(which, b, a), np.where(which, a, b)))
    exact = np.mean(np.abs(found) >= abs(observed) - 1e-12)
    tested = permutation_test(a, b, f1, 40_000)
    assert 0.02 < exact < 0.9
    assert tested.difference == pytest.approx(observed)
    assert tested.p == pytest.approx(exact, abs=0.01)


def test_permutation_p_is_uniform_without_a_difference():
    rng = np.random.default_rng(2)
    found = [
        permutation_test(*rng.normal(0, 1, (2, 3, 40, 1)), total, 199, seed=number).p for number in range(DATA_SETS)
    ]
    assert uniform(found) > 0.05


def test_the_check_of_uniformity_finds_a_false_test():
    """The same data, judged by seeds that are swapped as if each were examples of its own."""
    rng = np.random.default_rng(3)
    found = []
    for number in range(DATA_SETS):
        shared = rng.normal(0, 1, (2, 1, 40, 1))
        a, b = (np.repeat(each, 4, 0).reshape(1, 160, 1) for each in shared)
        found.append(permutation_test(a, b, total, 199, seed=number).p)
    assert uniform(found) < 1e-6


def test_permutation_test_finds_a_shift_of_one_standard_deviation():
    rng = np.random.default_rng(4)
    b = rng.normal(0, 1, (3, 60, 1))
    a = rng.normal(1, 1, (3, 60, 1))
    found = permutation_test(a, b, total, 2000)
    assert found.difference > 0 and found.p < 0.01


def test_permutation_test_is_antisymmetric():
    rng = np.random.default_rng(5)
    a, b = (rng.integers(0, 3, (3, 50, 3)).astype(float) for _ in range(2))
    there, back = permutation_test(a, b, f1, 500), permutation_test(b, a, f1, 500)
    assert back.difference == -there.difference and back.p == there.p


def test_permutation_test_in_chunks_is_a_permutation_test(monkeypatch):
    rng = np.random.default_rng(6)
    a, b = right(rng.random((2, 40)) < 0.75), right(rng.random((2, 40)) < 0.6)
    whole = permutation_test(a, b, accuracy, 4000)
    monkeypatch.setattr(statistics, "_CHUNK", 1000)
    chunked = permutation_test(a, b, accuracy, 4000)
    assert chunked.difference == whole.difference and chunked.p == pytest.approx(whole.p, abs=0.04)


def test_a_large_test_split_needs_no_gigabytes():
    rng = np.random.default_rng(7)
    a = np.zeros((9, 20_000, 60), dtype=np.uint8)
    a[:, :, 0] = 1
    b = a.copy()
    b[:, rng.random(20_000) < 0.9, 1] = 1
    tracemalloc.start()
    permutation_test(a, b, total, 200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300e6


def test_contributions_of_other_examples_are_refused():
    with pytest.raises(ValueError, match="must both be"):
        permutation_test(np.zeros((1, 3, 2)), np.zeros((1, 4, 2)), accuracy)
    with pytest.raises(ValueError, match="must both be"):
        permutation_test(np.zeros((3, 2)), np.zeros((3, 2)), accuracy)


# ------------------------------------------------------------------------------------------------ many comparisons


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.6]) == [1.0, 1.0] and holm([0.2]) == [0.2] and holm([]) == []
    assert holm([0.01, 0.04, 0.3], families=2) == pytest.approx([0.06, 0.16, 0.6])


def test_holm_keeps_the_chance_of_one_false_finding():
    """20 comparisons without a difference: raw p finds one in most data sets, corrected p in one of twenty."""
    p = np.random.default_rng(8).random((1000, 20))
    raw = np.mean((p < 0.05).any(1))
    corrected = np.mean([min(holm(row)) < 0.05 for row in p])
    assert raw > 0.5 and 0.03 < corrected < 0.07


# ------------------------------------------------------------------------------------------------ the verdict


def runs_of_one_model(rng: np.random.Generator, difficulty: np.ndarray, luck: float, seeds: int) -> np.ndarray:
    """Right answers of fine-tunings that differ by their luck, on examples of these difficulties."""
    skill = 1.2 + rng.normal(0, luck, (seeds, 1))
    return right(skill + difficulty + rng.normal(0, 0.7, (seeds, len(difficulty))) > 0)


def test_a_difference_must_hold_for_other_seeds_too():
    """Two lots of 3 seeds of the same model, whose accuracy varies by 0.8 points, on 5,000 examples."""
    rng = np.random.default_rng(0)
    by_examples, by_both, deviations = [], [], []
    for number in range(150):
        difficulty = rng.normal(0, 1, 5000)
        a, b = (runs_of_one_model(rng, difficulty, 0.04, 3) for _ in range(2))
        p = permutation_test(a, b, accuracy, 199, seed=number).p
        over_seeds = Spread.from_values(accuracy(a.sum(1)) - accuracy(b.sum(1))).p()
        by_examples.append(p < 0.05)
        by_both.append(greater_p(p, over_seeds) < 0.05)
        deviations.append(accuracy(a.sum(1)).std(ddof=1))
    assert 0.006 < np.mean(deviations) < 0.010
    assert np.mean(by_examples) > 0.25
    assert np.mean(by_both) < 0.07


def test_a_verdict_needs_both():
    assert greater_p(0.01, 0.04) == greater_p(0.04, 0.01) == 0.04
    assert greater_p(None, 0.01) is None and greater_p(0.01, None) is None


@pytest.mark.parametrize("tasks", [8, 20])
def test_of_all_tasks_five_percent_find_any_that_is_clear(tasks):
    """With the interval over seeds uncorrected 16 to 65% of evaluations of 20 tasks found something in nothing."""
    rng = np.random.default_rng(0)
    seeds = rng.normal(0, 0.01, (20_000, 5))
    of_examples = np.full(len(seeds), 0.001)  # a split so large that the seeds alone decide
    pool = list(zip(of_examples, stats.ttest_1samp(seeds, 0, axis=1).pvalue, seeds.mean(1), strict=True))
    single, uncorrected, either = false_alarms.families(pool, tasks, 2000, rng)
    assert 0.03 < single < 0.07
    assert 0.03 < either < 0.06 < uncorrected  # over all tasks or on a single one: the verdict speaks of both


def test_p_over_seeds_is_student_s_and_agrees_with_its_interval():
    rng = np.random.default_rng(9)
    for count in (2, 3, 5, 9):
        for _ in range(100):
            values = rng.normal(0.01, 0.01, count)
            spread = Spread.from_values(values)
            low, high = spread.interval()
            assert spread.p() == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
            assert (spread.p() < 0.05) == (low > 0 or high < 0)
    assert Spread.from_values([0.2]).p() is None


def test_wins_losses_and_ties():
    found = tally([0.02, 0.01, -0.03, 0.0004, -0.0004, 0.01], [True, False, True, True, False, False])
    assert (found.wins, found.losses, found.ties) == (3, 1, 2)
    assert (found.clear_wins, found.clear_losses) == (1, 1)
