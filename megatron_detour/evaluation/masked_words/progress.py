"""The progress of the masked-word evaluation: windows done, rate and time left."""

from __future__ import annotations

import time

from megatron_detour.ui.progress import Progress, time_left


class WindowProgress(Progress):
    def __init__(self, total: int) -> None:
        super().__init__([("windows", total)])
        self._total, self._done, self._name = total, 0, ""
        self._began = time.monotonic()

    def on(self, name: str) -> None:
        """Set the name of the current measurement."""
        self._name = name

    def add(self, windows: int) -> None:
        self._done += windows
        seconds = max(time.monotonic() - self._began, 1e-3)
        rate = f"{self._done / seconds:.1f} windows/s, {time_left(self._done, self._total, seconds)}"
        line = f"{self._name}: {self._done:,} of {self._total:,} windows, {rate}"
        self.update([self._done], [self._name, rate], line, now=self._done == self._total)
