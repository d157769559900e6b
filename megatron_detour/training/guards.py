"""Detect bad steps: a loss or gradient norm that is NaN, infinite, or far above those of previous steps."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

from megatron_detour.config.schema import Guards

GUARDED = ("loss", "gradient norm")


def is_guard_state(value: Any) -> bool:
    """Return whether `value` has the form of Guard.to_dict()."""
    recent = value.get("recent") if isinstance(value, dict) else None
    if not isinstance(recent, dict) or type(value.get("skipped_in_row")) is not int or set(recent) != set(GUARDED):
        return False
    return all(isinstance(v, list) and all(type(number) in (int, float) for number in v) for v in recent.values())


@dataclass(frozen=True)
class Judgment:
    """What is wrong with a step, and whether to skip its update."""

    fault: str | None = None
    skip: bool = False


def not_finite(figures: dict[str, float]) -> list[str]:
    """Return the names of metrics that are NaN or infinite."""
    return [name for name, value in figures.items() if not math.isfinite(value)]


class Guard:
    """Judges steps in order. Its state is saved in checkpoints, so a resumed run reaches the same judgments."""

    def __init__(self, settings: Guards) -> None:
        self.settings = settings
        self.skipped_in_row = 0
        self._recent: dict[str, deque[float]] = {}
        self.begin_phase()

    def begin_phase(self) -> None:
        """Forget previous steps: losses of different objectives are not comparable."""
        self._recent = {kind: deque(maxlen=self.settings.window) for kind in GUARDED}

    def judge(self, loss: float, norm: float) -> Judgment:
        """Return the judgment on a step's loss and gradient norm."""
        figures = {"loss": loss, "gradient norm": norm}
        for kind, value in figures.items():
            if not math.isfinite(value):
                return Judgment(f"the {kind} is {value}", skip=True)
        if self.settings.spikes != "ignore":
            for kind, value in figures.items():
                spike = self._spike(kind, value)
                if spike:
                    return Judgment(spike, skip=self.settings.spikes == "skip")
        return Judgment()

    def remember(self, loss: float, norm: float, judgment: Judgment) -> None:
        """Add a step to the window. Spikes count too, so that a lasting new level stops being one."""
        self.skipped_in_row = self.skipped_in_row + 1 if judgment.skip else 0
        if all(map(math.isfinite, (loss, norm))):
            self._recent["loss"].append(loss)
            self._recent["gradient norm"].append(norm)

    @property
    def out_of_patience(self) -> bool:
        return self.skipped_in_row >= self.settings.patience

    def to_dict(self) -> dict[str, Any]:
        return {"skipped_in_row": self.skipped_in_row, "recent": {kind: [*v] for kind, v in self._recent.items()}}

    def restore(self, state: dict[str, Any]) -> None:
        self.skipped_in_row = state["skipped_in_row"]
        for kind, values in state["recent"].items():
            self._recent[kind].extend(values)

    def _spike(self, kind: str, value: float) -> str | None:
        recent = self._recent[kind]
        if len(recent) < self.settings.window // 2:
            return None
        mean, deviation = statistics.fmean(recent), statistics.stdev(recent)
        if deviation == 0 or value <= mean + self.settings.sigma * deviation:
            return None
        sigmas = (value - mean) / deviation
        return f"spike: {kind} {value:.4g} is {sigmas:.1f} sigma above the mean of {len(recent)} steps, {mean:.4g}"
