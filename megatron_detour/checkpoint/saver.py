"""Work that goes on beside training: writing checkpoints and reports, in the order in which they were given."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Background:
    """A thread for writing. What a piece of work raises is raised by the next `check` or `wait`."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "writer")
        self._given: deque[Future] = deque()

    def submit(self, work: Callable[[], Any]) -> None:
        self._given.append(self._pool.submit(work))

    def check(self) -> None:
        """Raises what ended pieces have raised; does not wait."""
        while self._given and self._given[0].done():
            self._given.popleft().result()

    def wait(self, seconds: float | None = None) -> Any:
        """Waits until all is done, and returns what came last; None where that takes longer than `seconds`."""
        deadline, last = time.monotonic() + (seconds or 0), None
        while self._given:
            left = None if seconds is None else max(deadline - time.monotonic(), 0)
            if not futures.wait([self._given[0]], left).done:
                return None
            last = self._given.popleft().result()
        return last
