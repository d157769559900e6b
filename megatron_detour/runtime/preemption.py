"""When a run has to save and end: a signal, a time limit, the end of its Slurm job."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

from megatron_detour.ui.format import duration

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SPOKEN = {"SIGINT": "Ctrl-C"}
SLURM_MARGIN = 60.0  # seconds before the end of the job, as Slurm's clock and kill are not ours


@dataclass(frozen=True)
class _Limit:
    ends: float  # on the monotonic clock
    seconds: float  # from the start to the end
    least_margin: float
    name: str


class Preemption:
    """Gathers the requests to end; as a context manager it also takes SIGTERM, SIGUSR1 and Ctrl-C, which then only ask.

    A second Ctrl-C is Python's: it ends the process at once.

    Ranks may be asked at different times: the caller agrees with the others on what `reason` says.
    """

    def __init__(self, limit_seconds: float | None = None) -> None:
        """`limit_seconds` count from here. The end of a Slurm job (SLURM_JOB_END_TIME) is a limit as well."""
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
        if left > 0:  # a job that Slurm lets run past its end has no limit that we could know
            name = f"the end of the Slurm job at {time.strftime('%H:%M', time.localtime(int(ends)))}"
            self._limits.append(_Limit(now + left, left, SLURM_MARGIN, name))

    def __enter__(self) -> Preemption:
        self._before = {number: signal.signal(number, self._asked) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, Exception) and self._signal == signal.SIGTERM.name:
            error.asked_to_end = True  # by a launcher most likely, as another rank has failed

    def reserve_seconds(self, seconds: float) -> None:
        """Says how long a step and a save take: so much before a limit the run has to stop."""
        self._margin = seconds

    def reason(self) -> str | None:
        """Why the run has to save and end now, or None. Half of a limit is always left for work."""
        if self._signal is not None:
            return self._signal
        now = time.monotonic()
        for limit in sorted(self._limits, key=lambda limit: limit.ends):
            margin = min(max(self._margin, limit.least_margin), limit.seconds / 2)
            if now + margin >= limit.ends:
                return limit.name
        return None

    def _asked(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        asked, self._signal = self._signal, self._signal or SPOKEN.get(name, name)
        if number == signal.SIGINT and asked == SPOKEN["SIGINT"]:
            raise KeyboardInterrupt
