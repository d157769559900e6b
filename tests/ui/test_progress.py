"""Progress: a log gets few lines, a terminal bars, and both show what is hostile as codes."""

from __future__ import annotations

import io
import re

import pytest

from megatron_detour.corpus.progress import BuildProgress
from megatron_detour.ui.progress import Progress, time_left


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("megatron_detour.ui.progress.time.monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_per_interval_and_for_what_cannot_wait(clock: list[float]) -> None:
    stream = io.StringIO()
    with Progress([("bar", 10)], stream=stream, line_seconds=30) as progress:
        for second in range(0, 100, 10):
            clock[0] = float(second)
            progress.update([second / 10], [], f"at {second}", now=second == 50)
    assert stream.getvalue().splitlines() == ["at 30", "at 50", "at 80"]


def test_a_terminal_shows_bars_amounts_and_figures(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    with Progress([("one", 10), ("two", 4)], stream=stream) as progress:
        progress.update([5, 1], ["12 tokens/s", ""], "not for a terminal", now=True)
        progress.say("a line\x1b]0;owned")
    screen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert re.search(r"one .* 5/10 +50%", screen) and re.search(r"two .* 1/4 +25%", screen)
    assert "12 tokens/s" in screen and "a line\\x1b]0;owned" in screen and "not for a terminal" not in screen


def test_the_time_left_is_known_once_something_is_done() -> None:
    assert time_left(0, 10, 5.0) == ""
    assert time_left(2, 10, 100.0) == "6m40s left"


def test_a_build_says_its_rates(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with BuildProgress(200_000_000) as progress:
        clock[0] = 50.0
        progress.show(100_000_000, 25_000_000)
    assert capsys.readouterr().err == ("tokenizing: 100.0 of 200.0 MB, 2.0 MB/s, 0.5 Mtokens/s, 50s left\n")
