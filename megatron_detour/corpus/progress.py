"""The progress of a build: bytes read, MB/s, tokens per second and the time left."""

from __future__ import annotations

import sys
import time

from megatron_detour.text import visible
from megatron_detour.ui.progress import Progress, time_left


def say(line: str) -> None:
    print(visible(line), file=sys.stderr, flush=True)


class BuildProgress(Progress):
    """`total` are bytes on the disk, packed ones of packed files."""

    def __init__(self, total: int, what: str = "tokenizing") -> None:
        super().__init__([(what, total)], amount=_megabytes)
        self._total, self._what = total, what
        self._began = time.monotonic()

    def show(self, read: int, tokens: int) -> None:
        """`read` bytes of the input and `tokens` made since the build began."""
        seconds = max(time.monotonic() - self._began, 1e-3)
        rates = f"{read / seconds / 1e6:.1f} MB/s, {tokens / seconds / 1e6:.1f} Mtokens/s"
        figures = ", ".join(filter(None, (rates, time_left(read, self._total, seconds))))
        self.update([read], [figures], f"{self._what}: {_megabytes(read, self._total)}, {figures}")


def _megabytes(read: float, total: float) -> str:
    return f"{read / 1e6:,.1f} of {total / 1e6:,.1f} MB"
