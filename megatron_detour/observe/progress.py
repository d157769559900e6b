"""The progress of a run on the terminal: bars where there is one, plain lines in a log."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from typing import Any, Protocol, TextIO

from megatron_detour.objectives import KINDS
from megatron_detour.text import visible
from megatron_detour.ui.format import duration

RECENT_STEPS = 20
REFRESH_SECONDS = 0.2


class Progress:
    """Shows each phase of the plan and the latest figures; a context manager.

    `plan_phases` are the phases of plan.json, `done_steps` the steps that earlier sessions completed.
    Without a terminal, a line appears at most every `interval_seconds`, and always at a change of phase,
    at a validation and at the last step. What a guard did gets a line of its own.
    """

    def __init__(
        self,
        plan_phases: list[dict[str, Any]],
        done_steps: int,
        *,
        stream: TextIO | None = None,
        interval_seconds: float = 10,
    ) -> None:
        stream = stream or sys.stderr
        self.total_steps = sum(phase["steps"] for phase in plan_phases)
        self.total_tokens = max((phase["end_tokens"] for phase in plan_phases), default=0)
        self._done_steps = done_steps
        self._done_tokens: int | None = None
        self._rates = _Rates()
        self._display: _Display
        if stream.isatty() and os.environ.get("TERM") != "dumb":
            self._display = _Bars(plan_phases, done_steps, stream)
        else:
            self._display = _Lines(self.total_steps, stream, interval_seconds)

    def __enter__(self) -> Progress:
        self._display.open()
        return self

    def __exit__(self, *_: object) -> None:
        self._display.close()

    def update(self, record: dict[str, Any]) -> None:
        """Shows the record of a step, or of a validation before the first step."""
        self._done_steps = record["step"]
        self._done_tokens = record.get("tokens", self._done_tokens)
        self._rates.add(record.get("tokens_per_second"), record.get("seconds"))
        guard = guard_words(record)
        if guard:
            self.say(guard)
        self._display.show(record, self._figures(record))

    def say(self, message: str) -> None:
        """Prints a line above the bars."""
        self._display.say(message)

    @property
    def seconds_left(self) -> float | None:
        """The seconds to the end of the run at the recent rate; None before the first step."""
        rate = self._rates.smoothed
        if not rate or self._done_tokens is None:
            return None
        return max(0, self.total_tokens - self._done_tokens) / rate

    def _figures(self, record: dict[str, Any]) -> str:
        parts = []
        if record.get("loss") is not None:
            parts.append(f"loss {record['loss']:.3f}")
        if record.get("lr") is not None:
            parts.append(f"lr {record['lr']:.1e}")
        if self._rates.smoothed:
            parts.append(f"{self._rates.smoothed:,.0f} tokens/s")
        if record.get("mfu") is not None:
            parts.append(f"MFU {record['mfu']:.0%}")
        if self.seconds_left is not None and self._done_steps < self.total_steps:
            parts.append(f"{duration(self.seconds_left)} left")
        return "  ".join(parts)


class _Rates:
    """Tokens per second over the recent steps, each with its time."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT_STEPS)
        self._first: float | None = None

    def add(self, rate: float | None, seconds: float | None) -> None:
        if not rate or not seconds:
            return
        if self._first is None:
            self._first = rate
        else:
            self._recent.append((rate * seconds, seconds))

    @property
    def smoothed(self) -> float | None:
        # The first step of a session pays for compilation and warm caches: it counts only while it is alone.
        if not self._recent:
            return self._first
        return sum(tokens for tokens, _ in self._recent) / sum(seconds for _, seconds in self._recent)


class _Display(Protocol):
    def open(self) -> None: ...

    def close(self) -> None: ...

    def show(self, record: dict[str, Any], figures: str) -> None: ...

    def say(self, message: str) -> None: ...


class _Lines:
    """Plain lines for a log."""

    def __init__(self, total_steps: int, stream: TextIO, interval_seconds: float) -> None:
        self._total_steps = total_steps
        self._stream = stream
        self._interval_seconds = interval_seconds
        self._shown_at = float("-inf")
        self._phase: str | None = None

    def open(self) -> None:
        pass

    def close(self) -> None:
        self._stream.flush()

    def say(self, message: str) -> None:
        print(visible(message), file=self._stream, flush=True)

    def show(self, record: dict[str, Any], figures: str) -> None:
        validation = validation_figures(record)
        phase = _phase_title(record)
        due = time.monotonic() - self._shown_at >= self._interval_seconds
        last = record["step"] == self._total_steps
        if not (due or last or validation or phase != self._phase):
            return
        self._shown_at = time.monotonic()
        self._phase = phase
        parts = [f"step {record['step']}/{self._total_steps}", phase, figures, validation]
        self.say("  ".join(part for part in parts if part))


class _Bars:
    """One bar a phase and a line of figures below them."""

    def __init__(self, phases: list[dict[str, Any]], done_steps: int, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._phases = phases
        self._bars = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TaskProgressColumn(),
            auto_refresh=False,
        )
        self._tasks = [self._bars.add_task(_phase_title(phase), total=phase["steps"]) for phase in phases]
        self._fill(done_steps)
        self._figures = ""
        self._validation = ""
        self._shown_at = float("-inf")
        self._live = Live(console=Console(file=stream), auto_refresh=False, get_renderable=self._render)

    def open(self) -> None:
        self._live.start(refresh=True)

    def close(self) -> None:
        self._live.stop()

    def say(self, message: str) -> None:
        self._live.console.print(visible(message), markup=False, highlight=False)

    def show(self, record: dict[str, Any], figures: str) -> None:
        self._fill(record["step"])
        self._figures = figures
        validation = validation_figures(record)
        if validation:
            self._validation = f"step {record['step']}: {validation}"
        if validation or time.monotonic() - self._shown_at >= REFRESH_SECONDS:
            self._shown_at = time.monotonic()
            self._live.refresh()

    def _fill(self, done_steps: int) -> None:
        for task, phase in zip(self._tasks, self._phases, strict=True):
            done = done_steps - (phase["first_step"] - 1)
            self._bars.update(task, completed=min(max(done, 0), phase["steps"]))

    def _render(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        lines = [Text(line) for line in (self._figures, self._validation) if line]
        return Group(self._bars, *lines)


def validation_figures(record: dict[str, Any]) -> str:
    """Returns the validation figures of a record in words, or an empty string where it holds none."""
    parts = []
    for name, kind in KINDS.items():
        if record.get(f"val_{name}_loss") is not None:
            bits = _per_byte(record, f"val_{name}_bits_per_byte")
            parts.append(f"{kind.label} loss {record[f'val_{name}_loss']:.3f}{bits}")
        if record.get(f"val_{name}_accuracy") is not None:
            parts.append(f"{kind.label} accuracy {record[f'val_{name}_accuracy']:.1%}")
    return f"validation: {', '.join(parts)}" if parts else ""


def _per_byte(record: dict[str, Any], key: str) -> str:
    return f" ({record[key]:.3f} bits per byte)" if record.get(key) is not None else ""


def guard_words(record: dict[str, Any]) -> str:
    """Returns what a guard did at this step and why, or an empty string where it did nothing."""
    if record.get("skipped"):
        return f"step {record['step']}: the update was left out: {record['skipped']}"
    if record.get("spike"):
        return f"step {record['step']}: {record['spike']}; the update was made"
    return ""


def _phase_title(entry: dict[str, Any]) -> str:
    """The name and objective of a plan's phase (`name`) or of a record (`phase`)."""
    name = visible(" ".join(str(entry.get("phase") or entry.get("name") or "").split()))
    objective = entry.get("objective")
    if not name:
        return ""
    return f"{name} ({objective})" if objective else name
