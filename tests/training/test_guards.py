"""Which steps are skipped, and when a run gives up."""

from __future__ import annotations

import json
import math
import random

import pytest

from megatron_detour.config.schema import Guards
from megatron_detour.training.guards import Guard


def fed(guard: Guard, steps: int, seed: int = 0) -> Guard:
    """A guard that has seen ordinary steps: losses 5 +- 0.1, norms 1 +- 0.02."""
    rng = random.Random(seed)
    for _ in range(steps):
        loss, norm = rng.gauss(5, 0.1), rng.gauss(1, 0.02)
        guard.remember(loss, norm, guard.judge(loss, norm))
    return guard


@pytest.mark.parametrize("figures", [(math.nan, 1.0), (math.inf, 1.0), (5.0, math.nan), (5.0, math.inf)])
@pytest.mark.parametrize("spikes", ["skip", "report", "ignore"])
def test_what_is_no_number_is_always_skipped(figures, spikes):
    judgment = Guard(Guards(spikes=spikes)).judge(*figures)
    assert judgment.skip
    assert judgment.fault.startswith("the loss is" if not math.isfinite(figures[0]) else "the gradient norm is")


@pytest.mark.parametrize(("spikes", "skip"), [("skip", True), ("report", False)])
def test_a_spike_of_loss_or_gradient_is_told(spikes, skip):
    guard = fed(Guard(Guards(spikes=spikes)), 128)
    assert guard.judge(5.4, 1.0).fault is None
    loss, norm = guard.judge(6.0, 1.0), guard.judge(5.0, 1.5)
    assert loss.fault.startswith("spike: loss 6 is") and "sigma above the mean of 128 steps" in loss.fault
    assert norm.fault.startswith("spike: gradient norm 1.5 is")
    assert loss.skip == norm.skip == skip
    assert guard.judge(1.0, 0.01).fault is None  # below is good news


def test_spikes_may_be_ignored_and_need_steps_to_compare_with():
    assert fed(Guard(Guards(spikes="ignore")), 128).judge(100.0, 100.0).fault is None
    assert fed(Guard(Guards(spikes="skip")), 63).judge(100.0, 100.0).fault is None
    assert fed(Guard(Guards(spikes="skip")), 64).judge(100.0, 100.0).skip


def test_the_threshold_is_so_many_sigma():
    guard = Guard(Guards(spikes="skip", window=16, sigma=3.0))
    for loss in [1.0, 3.0] * 8:
        guard.remember(loss, 1.0, guard.judge(loss, 1.0))
    limit = 2 + 3 * math.sqrt(16 / 15)  # the sample's deviation
    assert not guard.judge(limit - 1e-9, 1.0).skip
    assert guard.judge(limit + 1e-9, 1.0).skip


def test_a_lasting_rise_is_soon_no_spike():
    guard = fed(Guard(Guards(spikes="skip", patience=50)), 128)
    skipped = 0
    while guard.judge(8.0, 1.0).skip:
        guard.remember(8.0, 1.0, guard.judge(8.0, 1.0))
        skipped += 1
    assert 1 <= skipped < 10


def test_patience_counts_steps_in_a_row():
    guard = Guard(Guards(patience=3))
    for value, out in [(math.nan, False), (math.nan, False), (5.0, False), (math.nan, False), (math.inf, False)]:
        guard.remember(value, 1.0, guard.judge(value, 1.0))
        assert guard.out_of_patience == out
    guard.remember(math.nan, 1.0, guard.judge(math.nan, 1.0))
    assert guard.out_of_patience


def test_a_phase_begins_without_the_losses_of_the_one_before():
    guard = fed(Guard(Guards(spikes="skip")), 128)
    guard.begin_phase()
    assert not guard.judge(100.0, 100.0).skip


def test_what_it_remembers_goes_through_json_to_the_bit():
    guard = fed(Guard(Guards(spikes="skip")), 100)
    guard.remember(math.nan, 1.0, guard.judge(math.nan, 1.0))
    resumed = Guard(Guards(spikes="skip"))
    resumed.restore(json.loads(json.dumps(guard.to_dict())))
    assert resumed.skipped_in_row == 1
    assert fed(resumed, 50, seed=1).to_dict() == fed(guard, 50, seed=1).to_dict()
    assert resumed.judge(5.7, 1.0) == guard.judge(5.7, 1.0)
