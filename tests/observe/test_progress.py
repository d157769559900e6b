from __future__ import annotations

import io
import re

import pytest

from megatron_detour.observe.progress import RunProgress, validation_figures

PHASES = [
    {"name": "warm", "objective": "mlm", "first_step": 1, "steps": 10, "end_tokens": 1_000},
    {"name": "detour [x]", "objective": "clm", "first_step": 11, "steps": 40, "end_tokens": 21_000},
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def record(step: int, rate: float | None = 1000.0, **fields: object) -> dict[str, object]:
    name, objective = ("warm", "mlm") if step <= 10 else ("detour [x]", "clm")
    # 100 tokens a step in the first phase, 500 in the second
    tokens, size = (100 * step, 100) if step <= 10 else (500 * step - 4_000, 500)
    seconds = size / rate if rate else None
    figures = {"phase": name, "objective": objective, "loss": 4.8123, "lr": 2e-3, "tokens_per_second": rate}
    return {"step": step, "tokens": tokens, "seconds": seconds, **figures, **fields}


def plain(line_seconds: float, done_steps: int = 0) -> tuple[RunProgress, io.StringIO]:
    stream = io.StringIO()
    return RunProgress(PHASES, done_steps, stream=stream, line_seconds=line_seconds), stream


def test_a_plain_line_says_it_all() -> None:
    progress, stream = plain(0)
    with progress:
        progress.show(record(30, rate=6480.4))
    assert stream.getvalue() == "step 30/50  detour [x] (clm)  loss 4.812  lr 2.0e-03  6,480 tokens/s  2s left\n"


def test_plain_lines_keep_their_distance_save_for_phases_validations_and_the_end() -> None:
    progress, stream = plain(3600)
    with progress:
        for step in range(1, 51):
            fields = {"val_mlm_loss": 2.5, "val_mlm_accuracy": 0.5} if step == 20 else {}
            progress.show(record(step, **fields))
    lines = stream.getvalue().splitlines()
    assert [int(re.match(r"step (\d+)/50", line)[1]) for line in lines] == [1, 11, 20, 50]
    assert lines[2].endswith("validation: MLM loss 2.500, MLM accuracy 50.0%")
    assert "left" not in lines[-1]


def test_plain_lines_follow_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("megatron_detour.ui.progress.time.monotonic", lambda: now)
    progress, stream = plain(10)
    for step in range(1, 11):
        progress.show(record(step))
        now += 4.0
    assert re.findall(r"step (\d+)/", stream.getvalue()) == ["1", "4", "7", "10"]


def test_the_time_left_comes_from_the_recent_rate_without_the_first_step() -> None:
    progress, _ = plain(0)
    assert progress.seconds_left is None
    progress.show(record(1, rate=10.0))
    assert progress.seconds_left == pytest.approx(20_900 / 10)
    progress.show(record(2, rate=1000.0))
    assert progress.seconds_left == pytest.approx(20_800 / 1000)
    progress.show(record(3, rate=500.0))
    # a step at each rate: 200 tokens in 0.3 s
    assert progress.seconds_left == pytest.approx(20_700 * 0.3 / 200)
    for step in range(11, 40):
        progress.show(record(step, rate=2000.0))
    assert progress.seconds_left == pytest.approx(5_500 / 2000)
    progress.show(record(50, rate=None))
    assert progress.seconds_left == 0


def test_a_small_step_weighs_less_than_a_large_one() -> None:
    progress, _ = plain(0)
    progress.show(record(9, rate=1.0))
    progress.show(record(10, rate=100.0))
    progress.show(record(11, rate=1000.0))
    # 100 tokens in 1 s and 500 in 0.5 s
    assert progress.seconds_left == pytest.approx(19_500 * 1.5 / 600)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"skipped": "the loss is nan", "loss": None}, "step 12: update skipped: the loss is nan"),
        (
            {"spike": "spike: loss 7.10 is 8.2 sigma above the mean of 128 steps"},
            "step 12: spike: loss 7.10 is 8.2 sigma above the mean of 128 steps; update applied",
        ),
    ],
)
def test_what_a_guard_did_is_a_line_at_once(fields: dict[str, object], line: str) -> None:
    progress, stream = plain(3600)
    progress.show(record(11))
    progress.show(record(12, **fields))
    progress.show(record(13))
    assert stream.getvalue().splitlines()[1:] == [line]


def test_the_use_of_the_machine_is_said_where_it_is_known() -> None:
    progress, stream = plain(0)
    progress.show(record(30, mfu=0.413))
    assert "1,000 tokens/s  MFU 41%" in stream.getvalue()


def test_a_validation_before_the_first_step_needs_no_loss() -> None:
    progress, stream = plain(0)
    progress.show({"step": 0, "val_clm_loss": 7.0})
    assert stream.getvalue() == "step 0/50  validation: CLM loss 7.000\n"


def test_messages_appear_as_they_are() -> None:
    progress, stream = plain(10)
    progress.say("saved [step 10]")
    assert stream.getvalue() == "saved [step 10]\n"


def terminal_screen(monkeypatch: pytest.MonkeyPatch, done_steps: int, last_step: int) -> str:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with RunProgress(PHASES, done_steps, stream=stream) as progress:
        for step in range(done_steps + 1, last_step + 1):
            progress.show(record(step))
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
    with RunProgress(PHASES, 0, stream=stream) as progress:
        progress.show(record(1))
    assert stream.getvalue().startswith("step 1/50  warm (mlm)")
    assert "\x1b" not in stream.getvalue()


def test_a_record_without_validation_has_no_validation_figures() -> None:
    assert validation_figures({"loss": 1.0, "val_mlm_loss": None}) == ""


def test_validation_figures_name_the_bits_per_byte() -> None:
    held = {"val_mlm_loss": 2.5, "val_mlm_bits_per_byte": 0.8125, "val_clm_loss": 3.0, "val_mlm_loss/notes": 1.0}
    assert validation_figures(held) == "validation: MLM loss 2.500 (0.812 bits per byte), CLM loss 3.000"
