"""Work beside training: in order, and no fault is lost."""

from __future__ import annotations

import threading

import pytest

from megatron_detour.training.checkpoints import Background


def test_work_is_done_in_order_while_the_caller_goes_on():
    background, done, gate = Background(), [], threading.Event()
    background.submit(lambda: (gate.wait(30), done.append(1)))
    background.submit(lambda: done.append(2))
    background.check()
    assert done == []
    gate.set()
    background.wait()
    assert done == [1, 2]


def test_what_it_raises_is_raised_by_the_next_check_or_wait():
    background, ended = Background(), threading.Event()

    def fails() -> None:
        ended.set()
        raise OSError(28, "No space left on device")

    background.submit(fails)
    with pytest.raises(OSError, match="No space left"):
        background.wait()
    background.submit(fails)
    background.submit(lambda: None)
    ended.wait(30)
    with pytest.raises(OSError, match="No space left"):
        for _ in range(10_000):
            background.check()
            threading.Event().wait(0.001)
    background.wait()
