"""How a build goes: bytes, MB/s, tokens a second and the time left; plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_detour.text import visible

SECONDS_A_LINE = 30


def say(line: str) -> None:
    print(visible(line), file=sys.stderr, flush=True)


class BuildProgress:
    def __init__(self, total: int, what: str = "tokenizing") -> None:
        self._total, self._what = total, what
        self._began = self._told = time.monotonic()
        console = Console(stderr=True)
        columns = (
            TextColumn(what),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console) if console.is_terminal else None
        self._task = self._bar.add_task("", total=total, rate="") if self._bar else None

    def __enter__(self) -> BuildProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, read: int, tokens: int) -> None:
        """`read` bytes of the input and `tokens` made since the build began."""
        now = time.monotonic()
        seconds = max(now - self._began, 1e-3)
        rate = f"{tokens / seconds / 1e6:.1f} Mtokens/s"
        if self._bar:
            self._bar.update(self._task, completed=read, rate=rate)
        elif now - self._told > SECONDS_A_LINE:
            self._told = now
            left = f", {(self._total - read) / read * seconds / 60:.0f} min left" if read else ""
            say(
                f"{self._what}: {read / 1e6:,.1f} of {self._total / 1e6:,.1f} MB on the disk, "
                f"{read / seconds / 1e6:.1f} MB/s, {rate}{left}"
            )
