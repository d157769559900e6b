from __future__ import annotations

import io
import re

import pytest

from megatron_detour.observe.progress import Progress, validation_figures

PHASES = [
    {"name": "warm", "objective": "mlm", "first_step": 1, "steps": 10},
    {"name": "detour [x]", "objective": "clm", "first_step": 11, "steps": 40},
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def record(step: int, rate: float | None = 1000.0, **fields: object) -> dict[str, object]:
    name, objective = ("warm", "mlm") if step <= 10 else ("detour [x]", "clm")
    figures = {"phase": name, "objective": objective, "loss": 4.8123, "lr": 2e-3, "tokens_per_second": rate}
    return {"step": step, **figures, **fields}


def plain(interval_seconds: float, done_steps: int = 0) -> tuple[Progress, io.StringIO]:
    stream = io.StringIO()
    return Progress(PHASES, 500, done_steps, stream=stream, interval_seconds=interval_seconds), stream


def test_a_plain_line_says_it_all() -> None:
    progress, stream = plain(0)
    with progress:
        progress.update(record(30, rate=6480.4))
    assert stream.getvalue() == "step 30/50  detour [x] (clm)  loss 4.812  lr 2.0e-03  6,480 tokens/s  2s left\n"


def test_plain_lines_keep_their_distance_save_for_phases_validations_and_the_end() -> None:
    progress, stream = plain(3600)
    with progress:
        for step in range(1, 51):
            fields = {"val_mlm_loss": 2.5, "val_mlm_accuracy": 0.5} if step == 20 else {}
            progress.update(record(step, **fields))
    lines = stream.getvalue().splitlines()
    assert [int(re.match(r"step (\d+)/50", line)[1]) for line in lines] == [1, 11, 20, 50]
    assert lines[2].endswith("validation: MLM loss 2.500, MLM accuracy 50.0%")
    assert "left" not in lines[-1]


def test_plain_lines_follow_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("megatron_detour.observe.progress.time.monotonic", lambda: now)
    progress, stream = plain(10)
    for step in range(1, 11):
        progress.update(record(step))
        now += 4.0
    assert re.findall(r"step (\d+)/", stream.getvalue()) == ["1", "4", "7", "10"]


def test_the_time_left_comes_from_the_recent_rate_without_the_first_step() -> None:
    progress, _ = plain(0)
    assert progress.seconds_left is None
    progress.update(record(1, rate=10.0))
    assert progress.seconds_left == pytest.approx(49 * 500 / 10)
    progress.update(record(2, rate=1000.0))
    assert progress.seconds_left == pytest.approx(48 * 500 / 1000)
    progress.update(record(3, rate=500.0))
    # a step at each rate: 1000 tokens in 1.5 s
    assert progress.seconds_left == pytest.approx(47 * 500 * 1.5 / 1000)
    for step in range(4, 30):
        progress.update(record(step, rate=2000.0))
    assert progress.seconds_left == pytest.approx(21 * 500 / 2000)


def test_a_validation_before_the_first_step_needs_no_loss() -> None:
    progress, stream = plain(0)
    progress.update({"step": 0, "val_clm_loss": 7.0})
    assert stream.getvalue() == "step 0/50  validation: CLM loss 7.000\n"


def test_messages_appear_as_they_are() -> None:
    progress, stream = plain(10)
    progress.say("saved [step 10]")
    assert stream.getvalue() == "saved [step 10]\n"


def terminal_screen(monkeypatch: pytest.MonkeyPatch, done_steps: int, last_step: int) -> str:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with Progress(PHASES, 500, done_steps, stream=stream) as progress:
        for step in range(done_steps + 1, last_step + 1):
            progress.update(record(step))
        progress.say("saved [step]")
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())


def test_a_terminal_shows_a_bar_per_phase_and_the_latest_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal_screen(monkeypatch, 0, 20)
    assert "saved [step]\n" in screen.replace("\r", "")
    last = screen[screen.rindex("warm (mlm)") :]
    assert re.search(r"warm \(mlm\).* 10/10 +100%", last)
    assert re.search(r"detour \[x\] \(clm\).* 10/40 +25%", last)
    assert "loss 4.812  lr 2.0e-03  1,000 tokens/s  15s left" in last


def test_a_resumed_run_starts_from_its_done_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal_screen(monkeypatch, 30, 30)
    assert re.search(r"warm \(mlm\).* 10/10 ", screen)
    assert re.search(r"detour \[x\] \(clm\).* 20/40 +50%", screen)


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Progress(PHASES, 500, 0, stream=stream) as progress:
        progress.update(record(1))
    assert stream.getvalue().startswith("step 1/50  warm (mlm)")
    assert "\x1b" not in stream.getvalue()


def test_a_record_without_validation_has_no_validation_figures() -> None:
    assert validation_figures({"loss": 1.0, "val_mlm_loss": None}) == ""
