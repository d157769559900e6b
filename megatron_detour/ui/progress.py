"""Progress on stderr: bars on a terminal, occasional lines in a log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from megatron_detour.text import visible
from megatron_detour.ui.format import compact, duration

LINE_SECONDS, REFRESH_SECONDS = 30.0, 0.2


class Progress:
    """A context manager. `bars` are titles and totals; `amount` formats the done and total amounts.

    Without a terminal, a line appears at most every `line_seconds`, and for each update with `now`.
    """

    def __init__(
        self,
        bars: Sequence[tuple[str, float]],
        *,
        stream: TextIO | None = None,
        line_seconds: float = LINE_SECONDS,
        amount: Callable[[float, float], str] = "{:,.0f}/{:,.0f}".format,
    ) -> None:
        self._stream = stream or sys.stderr
        self._live: Any = None
        self._figures: Sequence[str] = ()
        self._amount = amount
        terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        if terminal:
            self._make_bars(bars)
        self._seconds = REFRESH_SECONDS if terminal else line_seconds
        self._shown_at = time.monotonic()

    def _make_bars(self, bars: Sequence[tuple[str, float]]) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn
        from rich.progress import Progress as RichProgress

        title, amount = (TextColumn(f"{{task.{text}}}", markup=False) for text in ("description", "fields[amount]"))
        self._bars = RichProgress(title, BarColumn(bar_width=32), amount, TaskProgressColumn(), auto_refresh=False)
        self._tasks = [self._bars.add_task(visible(title), total=total, amount="") for title, total in bars]
        self._live = Live(console=Console(file=self._stream), auto_refresh=False, get_renderable=self._render)

    def _render(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        return Group(self._bars, *(Text(visible(line)) for line in self._figures if line))

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    @property
    def on_terminal(self) -> bool:
        return self._live is not None

    def say(self, line: str) -> None:
        """Print a line, above any bars."""
        if self._live:
            self._live.console.print(visible(line), markup=False, highlight=False, soft_wrap=True)
        else:
            print(visible(line), file=self._stream, flush=True)

    def update(self, done: Sequence[float], figures: Sequence[str], line: str, *, now: bool = False) -> None:
        """Set `done` of each bar and the lines of `figures` below them; a log gets `line`. `now`: do not wait."""
        self._figures = figures
        for number, amount in enumerate(done if self._live else ()):
            total = self._bars.tasks[number].total
            self._bars.update(self._tasks[number], completed=amount, amount=self._amount(amount, total))
        moment = time.monotonic()
        if now or moment - self._shown_at >= self._seconds:
            self._shown_at = moment
            self._live.refresh() if self._live else self.say(line)


class CountProgress(Progress):
    """Progress of a count over several measurements: done, rate and time left."""

    def __init__(self, total: int, noun: str) -> None:
        super().__init__([(noun, total)])
        self._total, self._noun, self._done, self._name = total, noun, 0, ""
        self._began = time.monotonic()

    def on(self, name: str) -> None:
        """Set the name of the current measurement."""
        self._name = name

    def add(self, count: int) -> None:
        self._done += count
        seconds = max(time.monotonic() - self._began, 1e-3)
        rate = f"{compact(self._done / seconds)} {self._noun}/s, {time_left(self._done, self._total, seconds)}"
        line = f"{self._name}: {self._done:,} of {self._total:,} {self._noun}, {rate}"
        self.update([self._done], [self._name, rate], line, now=self._done == self._total)


def time_left(done: float, total: float, seconds: float) -> str:
    """Return for instance ``4m10s left``, at the mean rate so far; "" if nothing is done yet."""
    return f"{duration((total - done) / done * seconds)} left" if done else ""
