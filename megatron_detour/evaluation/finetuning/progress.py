"""The progress of an evaluation: finished fine-tunings, their scores, the time left; plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from megatron_detour.evaluation.results import Cell, Result
from megatron_detour.ui.format import duration
from megatron_detour.ui.progress import Progress

if TYPE_CHECKING:
    from megatron_detour.evaluation.finetuning.worker import Job


class _Took(NamedTuple):
    """The duration of a finished fine-tuning, for estimating the remaining ones."""

    cell: Cell
    cost: float
    seconds: float
    device: str | None


class SuiteProgress(Progress):
    """Shows `jobs`, of which earlier sessions finished those in `done`, while `workers` run concurrently.

    The time left is estimated from durations of fine-tunings, not from wall time, so that startup and model loading
    do not distort it.
    """

    def __init__(self, jobs: Sequence[Job], done: Mapping[Cell, Result], workers: int) -> None:
        super().__init__([("fine-tuning", len(jobs))])
        self._total, self._workers = len(jobs), max(1, workers)
        self._waiting = {job.cell: job for job in jobs if job.cell not in done}
        self._took = [self._of(job, done[job.cell]) for job in jobs if job.cell in done]
        self._running: dict[Cell, float] = {}  # fractions done
        self._began = time.monotonic()

    @staticmethod
    def _of(job: Job, result: Result) -> _Took:
        return _Took(job.cell, job.cost, result.get("seconds", 0.0), result.get("device"))

    @property
    def _done(self) -> int:
        return self._total - len(self._waiting)

    def __enter__(self) -> SuiteProgress:
        super().__enter__()
        if self._done:
            self.say(f"{self._done} of {self._total} fine-tunings are already finished")
        return self

    def show(self, shares: Mapping[Cell, float]) -> None:
        """Show the fractions done of the running jobs. A log gets a line per finished fine-tuning instead."""
        self._running = dict(shares)
        if self.on_terminal:
            figures = [f"{duration(time.monotonic() - self._began)} elapsed", self.left()]
            self.update([self._done + sum(shares.values())], [", ".join(filter(None, figures))], "")

    def finished(self, job: Job, result: Result) -> None:
        self._waiting.pop(job.cell, None)
        self._running.pop(job.cell, None)
        self._took.append(self._of(job, result))
        left = self.left()
        self.say(
            f"{self._done}/{self._total}  {job.cell}: {result['metric']} {result['score']:.3f} "
            f"(validation {result['dev_score']:.3f}), {result['seconds']:.0f} s{', ' * bool(left)}{left}"
        )

    def left(self) -> str:
        """Return the time left, by durations of the same model and task on this device, else by cost; "" if unknown."""
        took = [one for one in self._took if one.device == self._took[-1].device]
        if not took or not self._waiting:
            return ""
        rate = sum(one.seconds for one in took) / (sum(one.cost for one in took) or 1.0)
        alike: dict[tuple[str, str], list[float]] = {}
        for one in took:
            alike.setdefault(one.cell[:2], []).append(one.seconds)
        seconds = 0.0
        for cell, job in self._waiting.items():
            same = alike.get(cell[:2])
            expected = sum(same) / len(same) if same else job.cost * rate
            seconds += expected * (1 - self._running.get(cell, 0.0))
        return f"{duration(seconds / min(self._workers, len(self._waiting)))} left"
