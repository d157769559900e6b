"""The progress of a run: a bar per phase and the latest figures, or log lines."""

from __future__ import annotations

from collections import deque
from typing import Any, TextIO

from megatron_detour.objectives import KINDS
from megatron_detour.ui.format import duration
from megatron_detour.ui.progress import Progress

RECENT_STEPS = 20


class RunProgress(Progress):
    """Shows each phase of the plan and the latest figures; a context manager.

    `plan_phases` are the phases of plan.json, `done_steps` the steps that earlier sessions completed.
    Without a terminal, a line appears at most every `line_seconds`, and always at a change of phase,
    a validation and the last step. Guard actions get a separate line.
    """

    def __init__(
        self,
        plan_phases: list[dict[str, Any]],
        done_steps: int,
        *,
        stream: TextIO | None = None,
        line_seconds: float = 10,
    ) -> None:
        bars = [(_phase_title(phase), phase["steps"]) for phase in plan_phases]
        super().__init__(bars, stream=stream, line_seconds=line_seconds)
        self.total_steps = sum(phase["steps"] for phase in plan_phases)
        self.total_tokens = max((phase["end_tokens"] for phase in plan_phases), default=0)
        self._phases, self._phase, self._validation = plan_phases, "", ""
        self._done_steps = done_steps
        self._done_tokens: int | None = None
        self._rates = _Rates()

    def __enter__(self) -> RunProgress:
        super().__enter__()
        if self.on_terminal:
            self.update(self._done_by_phase(), [], "", now=True)
        return self

    def show(self, record: dict[str, Any]) -> None:
        """Show the record of a step, or of a validation before the first step."""
        self._done_steps = record["step"]
        self._done_tokens = record.get("tokens", self._done_tokens)
        self._rates.add(record.get("tokens_per_second"), record.get("seconds"))
        guard = guard_words(record)
        if guard:
            self.say(guard)
        figures, validation, phase = self._figures_of(record), validation_figures(record), _phase_title(record)
        if validation:
            self._validation = f"step {record['step']}: {validation}"
        due = validation or record["step"] == self.total_steps or phase != self._phase
        self._phase = phase
        line = "  ".join(filter(None, (f"step {record['step']}/{self.total_steps}", phase, figures, validation)))
        self.update(self._done_by_phase(), [figures, self._validation], line, now=bool(due))

    def _done_by_phase(self) -> list[int]:
        return [min(max(self._done_steps - (phase["first_step"] - 1), 0), phase["steps"]) for phase in self._phases]

    @property
    def seconds_left(self) -> float | None:
        """Return the seconds to the end of the run at the recent rate; None before the first step."""
        rate = self._rates.smoothed
        if not rate or self._done_tokens is None:
            return None
        return max(0, self.total_tokens - self._done_tokens) / rate

    def _figures_of(self, record: dict[str, Any]) -> str:
        parts = []
        if record.get("loss") is not None:
            parts.append(f"loss {record['loss']:.3f}")
        if record.get("lr") is not None:
            parts.append(f"lr {record['lr']:.1e}")
        if self._rates.smoothed:
            parts.append(f"{self._rates.smoothed:,.0f} tokens/s")
        if record.get("mfu") is not None:
            parts.append(f"MFU {record['mfu']:.0%}")
        if self.seconds_left is not None and self._done_steps < self.total_steps:
            parts.append(f"{duration(self.seconds_left)} left")
        return "  ".join(parts)


class _Rates:
    """Tokens per second over recent steps."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT_STEPS)
        self._first: float | None = None

    def add(self, rate: float | None, seconds: float | None) -> None:
        if not rate or not seconds:
            return
        if self._first is None:
            self._first = rate
        else:
            self._recent.append((rate * seconds, seconds))

    @property
    def smoothed(self) -> float | None:
        # The first step of a session includes compilation and cold caches: it counts only while it is the only one.
        if not self._recent:
            return self._first
        return sum(tokens for tokens, _ in self._recent) / sum(seconds for _, seconds in self._recent)


def validation_figures(record: dict[str, Any]) -> str:
    """Return the validation figures of a record in words, or an empty string if there are none."""
    parts = []
    for name, kind in KINDS.items():
        if record.get(f"val_{name}_loss") is not None:
            bits = _per_byte(record, f"val_{name}_bits_per_byte")
            parts.append(f"{kind.label} loss {record[f'val_{name}_loss']:.3f}{bits}")
        if record.get(f"val_{name}_accuracy") is not None:
            parts.append(f"{kind.label} accuracy {record[f'val_{name}_accuracy']:.1%}")
    return f"validation: {', '.join(parts)}" if parts else ""


def _per_byte(record: dict[str, Any], key: str) -> str:
    return f" ({record[key]:.3f} bits per byte)" if record.get(key) is not None else ""


def guard_words(record: dict[str, Any]) -> str:
    """Return what a guard did at this step and why, or an empty string."""
    if record.get("skipped"):
        return f"step {record['step']}: update skipped: {record['skipped']}"
    if record.get("spike"):
        return f"step {record['step']}: {record['spike']}; update applied"
    return ""


def _phase_title(entry: dict[str, Any]) -> str:
    """Return the name and objective of a plan's phase (key `name`) or a record (key `phase`)."""
    name = " ".join(str(entry.get("phase") or entry.get("name") or "").split())
    objective = entry.get("objective")
    if not name:
        return ""
    return f"{name} ({objective})" if objective else name
