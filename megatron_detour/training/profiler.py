"""Profile a window of steps, set by the run file's `profile`, with torch's profiler: one Chrome trace per rank."""

from __future__ import annotations

import logging

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_detour.plan import Step
from megatron_detour.training.run import Run

logger = logging.getLogger(__name__)


class Profiler:
    """Records `profile.steps`, both ends included; a session that begins or ends inside records its part."""

    def __init__(self, run: Run) -> None:
        self._steps = run.config.profile.steps if run.config.profile else (0, 0)
        self._folder, self._rank = run.folder / "profile", run.parallel.rank
        self._activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if run.device.type == "cuda" else [])]
        self._recording: torch.profiler.profile | None = None
        self._first = 0

    def before(self, step: Step) -> None:
        if self._recording is None and self._steps[0] <= step.number <= self._steps[1]:
            self._recording, self._first = profile(activities=self._activities), step.number
            self._recording.start()

    def after(self, step: Step, is_last: bool) -> None:
        """Write the trace after the last step of the window, or of the session (`is_last`)."""
        if self._recording is None or (step.number < self._steps[1] and not is_last):
            return
        self._recording.stop()
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"steps-{self._first}-{step.number}-rank-{self._rank}.json"
        self._recording.export_chrome_trace(str(path))
        self._recording = None
        logger.info("wrote %s", path)
