"""When a run has to save and stop: a signal, a time limit, the end of its Slurm job."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

from megatron_detour.ui.format import duration

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SIGNAL_LABELS = {"SIGINT": "Ctrl-C"}
SLURM_MARGIN = 60.0  # seconds before the end of the job, as its clock and its kill are not exact


@dataclass(frozen=True)
class _Limit:
    ends: float  # on the monotonic clock
    seconds: float  # from the start to the end
    least_margin: float
    name: str


class Preemption:
    """Collects requests to stop. Within its context SIGTERM, SIGUSR1 and Ctrl-C are such requests.

    A second Ctrl-C raises KeyboardInterrupt as usual.

    Ranks may get a request at different times: the caller has to synchronize `reason` between them.
    """

    def __init__(self, limit_seconds: float | None = None) -> None:
        """`limit_seconds` count from now. The end of a Slurm job (SLURM_JOB_END_TIME) is a limit as well."""
        now = time.monotonic()
        self._signal: str | None = None
        self._margin = 0.0
        self._before: dict[signal.Signals, Any] = {}
        self._limits: list[_Limit] = []
        if limit_seconds is not None:
            name = f"the time limit of {duration(limit_seconds)}"
            self._limits.append(_Limit(now + limit_seconds, limit_seconds, 0.0, name))
        ends = os.environ.get("SLURM_JOB_END_TIME", "")
        left = int(ends) - time.time() if ends.isdigit() else 0.0
        if left > 0:  # the limit of a job that Slurm lets run past its end is unknown
            name = f"the end of the Slurm job at {time.strftime('%H:%M', time.localtime(int(ends)))}"
            self._limits.append(_Limit(now + left, left, SLURM_MARGIN, name))

    def __enter__(self) -> Preemption:
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, Exception) and self._signal == signal.SIGTERM.name:
            error.was_terminated = True  # most likely by the launcher, as another rank has failed

    def reserve_seconds(self, seconds: float) -> None:
        """Set the time that one step and one checkpoint take: the run stops this long before a limit."""
        self._margin = seconds

    def reason(self) -> str | None:
        """Return why the run has to save and stop now, or None. At least half of a limit is left for training."""
        if self._signal is not None:
            return self._signal
        now = time.monotonic()
        for limit in sorted(self._limits, key=lambda limit: limit.ends):
            margin = min(max(self._margin, limit.least_margin), limit.seconds / 2)
            if now + margin >= limit.ends:
                return limit.name
        return None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        earlier, self._signal = self._signal, self._signal or SIGNAL_LABELS.get(name, name)
        if number == signal.SIGINT and earlier == SIGNAL_LABELS["SIGINT"]:
            raise KeyboardInterrupt
