"""Tests of a study: by hand, against scipy, and on made-up studies with a known answer."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from scipy import stats

from megatron_detour.errors import DetourError
from megatron_detour.evaluation.report.statistics import holm
from megatron_detour.study.power import Luck, power
from megatron_detour.study.statistics import Comparison, compare, compare_values, complete_block, verdicts
from tests.study import false_alarms

STUDIES = 200


def arms(number: int, shape: tuple[int, int, int] = (6, 3, 3)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(number)
    return tuple(rng.normal(0.6, 0.01, shape) + rng.normal(0, 0.01, (1, shape[1], 1)) for _ in range(2))


# ------------------------------------------------------------------------------------------------ two arms


def test_training_seeds_are_the_units():
    a, b = arms(0)
    own, other = compare(a, b), stats.ttest_1samp((a - b).mean((0, 2)), 0)
    assert (own.low, own.high) == pytest.approx(other.confidence_interval(0.95))
    assert own.p == pytest.approx(other.pvalue)
    greater = stats.ttest_1samp((a - b).mean((0, 2)), 0, alternative="greater")
    assert own.p_above == pytest.approx(greater.pvalue)
    assert own.at_least == pytest.approx(greater.confidence_interval(0.95).low)
    assert (own.tasks, own.training_seeds, own.cells) == (6, 3, 54)


def test_the_bootstrap_is_the_paper_s():
    """Percentiles of resampled means as they are, by plain numpy; the report's bootstrap stretches them."""
    a, b = arms(1)
    cells = (a - b).ravel()
    means = cells[np.random.default_rng(3).integers(0, 54, (9999, 54))].mean(1)
    own = compare(a, b, "bootstrap", resamples=9999, seed=3)
    assert own.p_above == pytest.approx((1 + (means <= 0).sum()) / 10_000)
    assert (own.low, own.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=1e-4)


def test_of_one_training_seed_only_fine_tuning_can_be_judged():
    a, b = arms(2, (4, 1, 5))
    alone = compare(a + 0.02, b)
    assert (alone.low, alone.at_least, alone.p, alone.p_above) == (None, None, 1.0, 1.0)
    own = compare(a + 0.02, b, "finetuning")
    errors = (a - b)[:, 0].var(1, ddof=1) / 5 / 16
    df = errors.sum() ** 2 / (errors**2 / 4).sum()
    assert own.p == pytest.approx(2 * stats.t.sf((a + 0.02 - b).mean() / errors.sum() ** 0.5, df))


def test_fine_tuning_of_one_task_is_student_s():
    a, b = arms(3, (1, 1, 6))
    assert compare(a, b, "finetuning").p == pytest.approx(stats.ttest_rel(a.ravel(), b.ravel()).pvalue)


def test_other_tasks_ask_for_more_than_these_tasks():
    a, b = arms(4)
    fixed, random = compare(a, b), compare(a, b, tasks="random")
    assert random.low <= fixed.low and random.p >= fixed.p
    a = a + np.array([0.01, 0.06, 0.02, 0.05, 0.03, 0.07])[:, None, None]
    fixed, random = compare(a, b), compare(a, b, tasks="random")
    assert random.low < fixed.low and random.p > max(fixed.p, stats.ttest_1samp((a - b).mean((1, 2)), 0).pvalue)
    assert compare(a[:1], b[:1], tasks="random").p == 1.0  # one task says nothing of others


@pytest.mark.parametrize("level", [0.05, 0.2])
@pytest.mark.parametrize(
    "test",
    [
        compare,
        partial(compare, tasks="random"),
        *(partial(compare, method=each) for each in ("finetuning", "bootstrap")),
    ],
)
def test_p_says_what_the_bounds_say(test, level):
    met = []
    for number in range(100):
        own = test(*arms(number), level=level, **({"resamples": 199} if "bootstrap" in str(test) else {}))
        assert (own.p < level) == (own.low > 0 or own.high < 0)
        assert (own.p_above < level) == (own.at_least > 0)
        met.append(own.p < level)
    assert 0 < sum(met) < 100


@pytest.mark.parametrize("method", ["hierarchical", "finetuning", "bootstrap"])
def test_arms_change_sides(method):
    a, b = arms(5)
    there, back = compare(a, b, method), compare(b, a, method)
    assert (back.mean, back.low, back.at_least) == pytest.approx((-there.mean, -there.high, -there.at_most))
    assert back.p == there.p
    if method != "bootstrap":
        assert back.p_above == pytest.approx(1 - there.p_above)


@pytest.mark.parametrize("method", ["hierarchical", "finetuning", "bootstrap"])
def test_equal_differences_show_nothing(method):
    a, _ = arms(6)
    own = compare(a + 0.1, a, method)
    assert own.mean == pytest.approx(0.1)
    assert (own.low, own.at_most, own.p, own.p_above) == (None, None, 1.0, 1.0)


# ------------------------------------------------------------------------------------------------ gaps


def test_a_gap_leaves_out_the_smaller_part():
    present = np.ones((6, 3), dtype=bool)
    present[2, 1] = False  # one cell: a task goes, not a training seed
    assert [list(each) for each in complete_block(present)] == [[0, 1, 3, 4, 5], [0, 1, 2]]
    present[1:, 1] = False  # a training seed that has begun: it goes
    assert [list(each) for each in complete_block(present)] == [[0, 1, 2, 3, 4, 5], [0, 2]]
    present[:, 1], present[0, 2] = False, False
    assert [list(each) for each in complete_block(present)] == [[1, 2, 3, 4, 5], [0, 2]]
    assert all(not len(each) for each in complete_block(np.zeros((2, 3), dtype=bool)))


def test_a_gap_does_not_shift_the_mean():
    """Arm a is better by 10 points on an easy task that one training seed lacks."""
    a, b = arms(7)
    a[0] += 0.1
    a[0, 0] = np.nan
    own = compare(a, b)
    assert own.mean == pytest.approx((a - b)[1:].mean())
    assert (own.tasks, own.training_seeds, own.cells) == (5, 3, 45)


def test_a_missing_fine_tuning_leaves_out_its_pair_alone():
    a, b = arms(8)
    b[1, 2, 0] = np.nan
    own = compare(a, b)
    assert own.mean == pytest.approx(np.nanmean(a - b, axis=2).mean())
    assert (own.tasks, own.training_seeds, own.cells) == (6, 3, 53)


def test_arms_without_a_pair_are_refused():
    a, b = arms(9)
    with pytest.raises(DetourError, match="no task, training seed and fine-tuning seed in common"):
        compare(a, np.full_like(b, np.nan))
    with pytest.raises(DetourError, match="two pairs of fine-tuning seeds"):
        compare(a[:, :, :1], b[:, :, :1], "finetuning")
    with pytest.raises(ValueError, match="must be"):
        compare(a[0], b[0])


# ------------------------------------------------------------------------------------------------ one number a seed


def test_numbers_are_compared_by_student_s_t():
    a, b = [0.31, 0.35, 0.30], [0.25, 0.31, 0.27]
    own, other = compare_values(a, b), stats.ttest_rel(a, b, alternative="greater")
    assert own.p_above == pytest.approx(other.pvalue) and own.than == 0
    assert own.at_least == pytest.approx(other.confidence_interval(0.95).low)
    assert compare_values(a, than=0.3).p == pytest.approx(stats.ttest_1samp(a, 0.3).pvalue)


def test_ratios_are_compared_by_their_logarithms():
    low, high = np.array([5.0, 9.0, 7.0]), np.array([1.1, 1.2, 1.3])
    own, other = compare_values(low, high, log=True), stats.ttest_rel(np.log(low), np.log(high))
    assert own.mean == pytest.approx(stats.gmean(low / high)) and own.than == 1
    assert own.p == pytest.approx(other.pvalue)
    assert (own.low, own.high) == pytest.approx(tuple(np.exp(other.confidence_interval(0.95))))
    above = compare_values(low, than=2, log=True)
    assert above.p_above == pytest.approx(stats.ttest_1samp(np.log(low), np.log(2), alternative="greater").pvalue)
    assert above.than == 2 and above.at_least > 2


def test_a_missing_number_leaves_out_its_seed():
    own = compare_values([5.0, np.nan, 7.0, 6.0], [1.0, 1.0, np.nan, 2.0])
    assert (own.mean, own.training_seeds) == (4.0, 2)
    assert compare_values([5.0]).p_above == 1.0
    with pytest.raises(DetourError, match="no training seed"):
        compare_values([np.nan])
    with pytest.raises(DetourError, match="logarithms, and 0 has none"):
        compare_values([1.0, 0.0], log=True)


# ------------------------------------------------------------------------------------------------ criteria


def judged(p_above: float) -> Comparison:
    return Comparison("", 0.0, None, None, None, None, 1.0, p_above, 0.05, 0.0, 1, 1, 1)


def test_criteria_are_corrected_where_that_is_stricter():
    criteria = [
        (judged(0.02), "above"),
        (judged(0.03), "above"),
        (judged(0.04), "not above"),
        (judged(0.6), "not above"),
    ]
    found = verdicts(criteria)
    assert [each.met for each in found] == [True, True, False, True]
    assert [each.p for each in found] == pytest.approx([*holm([0.02, 0.03]), 0.04, 0.6])
    assert [each.met for each in verdicts([(judged(0.03), "above")] * 2)] == [False, False]
    assert verdicts([]) == []


# ------------------------------------------------------------------------------------------------ known answers


@pytest.mark.parametrize("training_seeds", [2, 3, 5])
@pytest.mark.parametrize("shared", [0.0, 0.5, 2.0])
def test_five_percent_find_something_in_nothing(training_seeds, shared):
    """The standard error of 5% in 400 studies is 1.1%."""
    hierarchical = false_alarms.TESTS["hierarchical"]
    assert 0.01 < false_alarms.rate(hierarchical, 400, training_seeds, shared) < 0.1
    random = partial(false_alarms.p_of, "hierarchical", tasks="random")
    assert false_alarms.rate(random, 200, training_seeds, shared, of_tasks=1.0) < 0.12


def test_the_luck_of_a_single_start_model_is_not_lost():
    """Its fine-tunings move the differences of all training seeds alike: 20% of studies would find something."""
    rng, found, lost = np.random.default_rng(2), [], []
    for _ in range(400):
        start = np.repeat(rng.normal(0, 1, (6, 1, 3)), 5, axis=1)
        arm = rng.normal(0, 1, (6, 5, 3)) + rng.normal(0, 0.1, (1, 5, 1))
        found.append(compare(arm, start).p_above < 0.05)
        lost.append(stats.ttest_1samp((arm - start).mean((0, 2)), 0, alternative="greater").pvalue < 0.05)
    assert np.mean(lost) > 0.15 and 0.01 < np.mean(found) < 0.1
    assert compare(arm[:, :, :1], start[:, :, :1]).p == 1.0  # a single fine-tuning of it: nothing is known of its luck


def test_the_bootstrap_takes_training_seeds_for_independent_cells():
    assert false_alarms.rate(false_alarms.TESTS["bootstrap"], 200, 3, 1.0) > 0.2


def test_fine_tuning_alone_is_judged_at_its_level():
    """Training seeds that all differ by the same: what the test of these very models asks."""
    rng, found = np.random.default_rng(0), []
    for _ in range(400):
        difference = rng.normal(0, [[[1.0]], [[3.0]], [[1.0]], [[0.5]]], (4, 1, 3))
        found.append(compare(difference, np.zeros_like(difference), "finetuning").p_above < 0.05)
    assert 0.01 < np.mean(found) < 0.1


def made_up_study(rng: np.random.Generator, planted: float) -> list[tuple[Comparison, str]]:
    """Two arms that are better than the control by `planted`, one that is as good, and a drift ratio of 6."""
    arms = {"control": 0.0, "detour": planted, "mid frozen": planted, "low frozen": 0.0}
    scores = {}
    for name, better in arms.items():
        training = rng.normal(0, 0.003, (1, 3, 1)) + rng.normal(0, 0.004, (6, 3, 1))
        scores[name] = 0.6 + better + training + rng.normal(0, 0.01, (6, 3, 3))
    ratios = 6 * np.exp(rng.normal(0, 0.2, 3))
    return [
        (compare(scores["detour"], scores["control"]), "above"),
        (compare(scores["mid frozen"], scores["control"]), "above"),
        (compare(scores["low frozen"], scores["control"]), "not above"),
        (compare_values(ratios, than=2, log=True), "above"),
    ]


def test_a_study_says_what_was_planted():
    """An effect that a third of the level finds in 95% is enough for three criteria by Holm."""
    effect = power(Luck((0.01,) * 6, shared=0.003, own=0.004), 3, 3, level=0.05 / 3, chance=0.95)
    rng = np.random.default_rng(0)
    met = np.array([[each.met for each in verdicts(made_up_study(rng, effect))] for _ in range(STUDIES)])
    assert (met.mean(0)[:2] > 0.89).all() and met.mean(0)[3] > 0.9
    assert 0.89 < met.mean(0)[2] < 0.99  # in 5% of the studies luck looks like an effect


def test_a_study_of_nothing_finds_nothing():
    rng = np.random.default_rng(1)
    found = [[each.met for each in verdicts(made_up_study(rng, 0.0)[:3])] for _ in range(STUDIES)]
    false = np.array(found)[:, :2].any(1)
    assert 0.005 < false.mean() < 0.11
    assert np.array(found)[:, 2].mean() > 0.89
