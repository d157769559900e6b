"""How an evaluation goes: finished fine-tunings, their scores, the time left; plain lines without a terminal."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from megatron_detour.evaluation.results import Cell, Result


class SuiteProgress:
    """`total` fine-tunings, `done` of them in earlier sessions; `cost` of the others, in any unit."""

    def __init__(self, total: int, done: int, cost: float) -> None:
        self._total, self._done, self._cost = total, done, cost
        self._paid = 0.0
        self._began = time.monotonic()
        console = Console(stderr=True)
        columns = (
            TextColumn("fine-tuning"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self._bar = Progress(*columns, console=console) if console.is_terminal else None
        self._task = self._bar.add_task("", total=max(cost, 1), count=f"{done}/{total}", left="") if self._bar else None
        self._console = self._bar.console if self._bar else console

    def __enter__(self) -> SuiteProgress:
        if self._done:
            self._say(f"{self._done} of {self._total} fine-tunings were finished before")
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, shares: list[float], costs: list[float]) -> None:
        """`shares` of the jobs that run are done, which cost `costs`; their order does not matter much."""
        if self._bar:
            partly = sum(share * cost for share, cost in zip(sorted(shares), sorted(costs), strict=False))
            paid = self._paid + partly
            self._bar.update(self._task, completed=paid, count=f"{self._done}/{self._total}", left=self._left(paid))

    def finished(self, result: Result, cost: float) -> None:
        self._done += 1
        self._paid += cost
        self._say(
            f"{self._done}/{self._total}  {Cell.of(result)}: {result['metric']} {result['score']:.3f} "
            f"(validation {result['dev_score']:.3f}), {result['seconds']:.0f} s{self._left(self._paid, ', ')}"
        )

    def _left(self, paid: float, before: str = "") -> str:
        spent = time.monotonic() - self._began
        if not paid or paid >= self._cost:
            return ""
        minutes = spent * (self._cost - paid) / paid / 60
        return f"{before}{minutes:.0f} min left" if minutes < 120 else f"{before}{minutes / 60:.1f} h left"

    def _say(self, line: Any) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)
