"""Both kinds of luck, and the power of a study."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_detour.study import power as module
from megatron_detour.study.power import Luck, luck, power
from megatron_detour.study.statistics import compare

GIVEN = Luck((0.01,) * 6, shared=0.003, own=0.004)


def scores(rng: np.random.Generator, seeds: int, of_finetuning: np.ndarray, shared: float, own: float) -> np.ndarray:
    shape = (len(of_finetuning), seeds, 3)
    found = 0.6 + rng.normal(0, shared, (1, seeds, 1)) + rng.normal(0, own, (*shape[:2], 1))
    return found + rng.normal(0, of_finetuning[:, None, None], shape)


def test_luck_is_taken_apart():
    of_finetuning = np.array([0.005, 0.01, 0.01, 0.02])
    found = luck(scores(np.random.default_rng(0), 4000, of_finetuning, 0.006, 0.008))
    assert found.finetuning == pytest.approx(of_finetuning, rel=0.05)
    assert found.training == pytest.approx([0.01] * 4, rel=0.07)
    assert (found.shared, found.own) == pytest.approx((0.006, 0.008), rel=0.07)


def test_luck_by_hand():
    """Means 1 and 3, each cell +-1: the variance of the means, 2, less half of the variance of single scores, 2."""
    found = luck(np.array([[[0.0, 2.0], [2.0, 4.0]]]))
    assert (found.finetuning, found.training) == (pytest.approx((2**0.5,)), pytest.approx((1.0,)))
    assert (found.shared, found.own) == (None, None)  # one task cannot tell them apart


def test_three_seeds_show_what_the_docstring_says():
    rng = np.random.default_rng(1)
    shown = np.quantile(rng.normal(0, 1, (20_000, 3)).std(1, ddof=1), [0.025, 0.975])
    assert shown == pytest.approx([0.16, 1.92], abs=0.03)


def test_unknown_luck_is_none():
    pilot = luck(scores(np.random.default_rng(2), 1, np.array([0.01, 0.01]), 0.0, 0.0))
    assert None not in pilot.finetuning and pilot.training == (None, None) and pilot.shared is None
    single = luck(np.full((2, 3, 1), 0.5))
    assert single.finetuning == (None, None) and single.training == (None, None)
    empty = luck(np.full((2, 3, 2), np.nan))
    assert empty == Luck((None, None), (None, None), None, None)


def test_gaps_do_not_change_what_luck_means():
    full = scores(np.random.default_rng(3), 2000, np.array([0.01, 0.01, 0.01]), 0.006, 0.008)
    full[np.random.default_rng(4).random(full.shape) < 0.1] = np.nan
    full[2, :50] = np.nan
    found = luck(full)
    assert found.finetuning == pytest.approx([0.01] * 3, rel=0.05)
    assert found.training == pytest.approx([0.01] * 3, rel=0.1)


def test_luck_that_fine_tuning_explains_is_zero():
    assert luck(np.array([[[0.0, 2.0], [0.0, 2.0]], [[1.0, 5.0], [1.0, 5.0]]])).training == (0.0, 0.0)


# ------------------------------------------------------------------------------------------------ power


def found(effect: float, studies: int, **settings) -> float:
    rng, count = np.random.default_rng(5), 0
    for _ in range(studies):
        a, b = (scores(rng, 3, np.full(6, 0.01), 0.003, 0.004) for _ in range(2))
        a = a + rng.normal(0, settings.get("task_sd", 0.0), (6, 1, 1))
        count += compare(a + effect, b, tasks=settings.get("tasks", "fixed")).p_above < 0.05
    return count / studies


def test_an_effect_of_this_size_is_found_with_this_chance():
    assert found(power(GIVEN, 3, 3), 400) == pytest.approx(0.8, abs=0.07)
    random = {"tasks": "random", "task_sd": 0.01}
    assert found(power(GIVEN, 3, 3, **random), 400, **random) == pytest.approx(0.8, abs=0.07)


def test_power_grows_with_the_study():
    effects = [power(GIVEN, seeds, 3) for seeds in (2, 3, 5, 9)]
    assert effects == sorted(effects, reverse=True)
    assert power(GIVEN, 3, 9) < power(GIVEN, 3, 3) < power(GIVEN, 3, 3, level=0.01)
    assert power(GIVEN, 3, 3, chance=0.95) > power(GIVEN, 3, 3)
    assert power(GIVEN, 3, 3, of_differences=True) == pytest.approx(power(GIVEN, 3, 3) / 2**0.5)


@pytest.mark.parametrize("method", ["hierarchical", "finetuning", "bootstrap"])
def test_one_training_seed_has_no_power_over_others(monkeypatch, method):
    monkeypatch.setattr(module, "TRIALS", 50)
    effect = power(GIVEN, 1, 3, method=method)
    assert (effect is None) == (method == "hierarchical")
    assert power(GIVEN, 1, 3, tasks="random") is None
    assert effect == power(GIVEN, 1, 3, method=method)  # a page says the same each time
