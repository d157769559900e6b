"""Requests to end: signals only ask, limits leave time to save."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_detour.runtime.preemption import SIGNAL_LABELS, SIGNALS, Preemption
from tests.harness import ROOT, environment


class Clock:
    """Both clocks, which move together when told to."""

    def __init__(self, monkeypatch):
        self.passed = 0.0
        start = time.time()
        monkeypatch.setattr(time, "monotonic", lambda: 1000.0 + self.passed)
        monkeypatch.setattr(time, "time", lambda: start + self.passed)


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    return Clock(monkeypatch)


@pytest.fixture
def ends_in(clock, monkeypatch):
    def set_end(seconds):
        end = int(time.time() + seconds)
        monkeypatch.setenv("SLURM_JOB_END_TIME", str(end))
        return time.strftime("%H:%M", time.localtime(end))

    return set_end


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_only_asks_however_often_it_comes(clock, number):
    before = [signal.getsignal(each) for each in SIGNALS]
    with Preemption() as stop:
        assert stop.reason() is None
        os.kill(os.getpid(), number)
        if number != signal.SIGINT:
            os.kill(os.getpid(), number)
        assert stop.reason() == SIGNAL_LABELS.get(number.name, number.name)
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_the_first_signal_is_the_reason(clock):
    with Preemption() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason() == "SIGUSR1"


def test_a_second_ctrl_c_does_not_wait(clock):
    with Preemption() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason() == "Ctrl-C"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)


SLOW_RANK = """
import os, signal
from megatron_detour.errors import DetourError, command_line
from megatron_detour.runtime.preemption import Preemption

def main():
    with Preemption():
        os.kill(os.getpid(), signal.{signal})  # as a launcher does when another rank has failed
        raise DetourError("a fault that every rank meets")

command_line(main, grace=0.5)
"""


@pytest.mark.parametrize(
    ("rank", "asked", "expected"),
    [
        ("1", "SIGTERM", ""),
        ("0", "SIGTERM", "error: a fault that every rank meets\n"),
        ("1", "SIGUSR1", "error (rank 1): a fault that every rank meets\n"),
    ],
)
def test_a_rank_that_was_ended_before_it_failed_says_nothing(rank, asked, expected):
    result = subprocess.run(
        [sys.executable, "-c", SLOW_RANK.format(signal=asked)],
        env=environment() | {"RANK": rank},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (result.returncode, result.stdout, result.stderr) == (1, "", expected)


def first_reason(stop, clock, step=10.0):
    """The seconds after which the run has to stop, and why."""
    while stop.reason() is None:
        clock.passed += step
        assert clock.passed < 10**6
    return clock.passed, stop.reason()


@pytest.mark.parametrize(
    ("limit", "margin", "stops", "spoken"),
    [
        (23 * 3600, 600, 23 * 3600 - 600, "23h00m"),
        (5400, 0, 5400, "1h30m"),
        (600, 400, 300, "10m00s"),  # half of the limit is for work
        (100, 0, 100, "1m40s"),
    ],
)
def test_a_limit_leaves_the_margin(clock, limit, margin, stops, spoken):
    stop = Preemption(limit)
    stop.reserve_seconds(margin)
    assert first_reason(stop, clock) == (stops, f"the time limit of {spoken}")


@pytest.mark.parametrize(("margin", "stops"), [(0, 3600 - 60), (300, 3600 - 300), (10**6, 1800)])
def test_the_end_of_the_job_leaves_a_minute_at_least(clock, ends_in, margin, stops):
    at = ends_in(3600)
    stop = Preemption()
    stop.reserve_seconds(margin)
    seconds, reason = first_reason(stop, clock)
    assert seconds == pytest.approx(stops, abs=10)
    assert reason == f"the end of the Slurm job at {at}"


@pytest.mark.parametrize(
    ("limit", "reason"), [(1800, "the time limit of 30m00s"), (7200, "the end of the Slurm job at")]
)
def test_the_earlier_limit_counts(clock, ends_in, limit, reason):
    ends_in(3600)
    assert first_reason(Preemption(limit), clock)[1].startswith(reason)


@pytest.mark.parametrize("seconds", [-100, None])
def test_an_end_that_says_nothing_is_no_limit(clock, ends_in, monkeypatch, seconds):
    if seconds is None:
        monkeypatch.setenv("SLURM_JOB_END_TIME", "Unknown")
    else:
        ends_in(seconds)
    stop = Preemption()
    clock.passed = 10.0**9
    assert stop.reason() is None
