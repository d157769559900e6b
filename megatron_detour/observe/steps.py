"""The figures of a run's steps as columns, which take 1% of the memory of dicts."""

from __future__ import annotations

import math
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from megatron_detour.errors import DetourError
from megatron_detour.objectives import KINDS
from megatron_detour.observe.sinks import Record, metrics_lines

FIGURES = (
    "tokens",
    "loss",
    "grad_norm",
    "lr",
    *dict.fromkeys(key for kind in KINDS.values() for key in kind.scheduled),
    "sequences",
    "padding_share",
    "data_crc",
    "tokens_per_second",
    "seconds",
    "data_wait_seconds",
    "memory_bytes",
    "model_tflops",
    "mfu",
)
LARGEST_STEP = 2**53


class Steps:
    """A column per figure over the ascending steps `numbers`; NaN for missing figures."""

    def __init__(self, numbers: np.ndarray, columns: dict[str, np.ndarray]) -> None:
        self.numbers, self._columns = numbers, columns

    @classmethod
    def none(cls) -> Steps:
        return cls(np.zeros(0, np.int64), {})

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, figure: str) -> np.ndarray:
        column = self._columns.get(figure)
        return np.full(len(self), np.nan) if column is None else column

    def has(self, figure: str) -> bool:
        return not np.isnan(self[figure]).all()

    def varies(self, figure: str) -> bool:
        values = self[figure]
        return len(np.unique(values[~np.isnan(values)])) > 1

    def between(self, first: int, last: int) -> Steps:
        """Return the steps from `first` to `last`, without copying."""
        start, end = np.searchsorted(self.numbers, [first, last + 1])
        return Steps(self.numbers[start:end], {name: column[start:end] for name, column in self._columns.items()})

    def replaced(self, figure: str, values: np.ndarray) -> Steps:
        return Steps(self.numbers, self._columns | {figure: values})

    def total(self, figure: str) -> float:
        return float(np.nansum(self[figure]))

    def total_of(self, figure: str, weight: str) -> float:
        return float(np.nansum(self[figure] * self[weight]))

    def mean(self, figure: str, weight: str) -> float | None:
        """Return the weighted mean over the steps that have both; None if there are none."""
        values, weights = self[figure], self[weight]
        there = ~np.isnan(values) & (weights > 0)
        return float(np.average(values[there], weights=weights[there])) if there.any() else None

    def points(self, figure: str) -> tuple[np.ndarray, np.ndarray]:
        """Return trained tokens and values of the steps that have the figure."""
        values = self[figure]
        there = ~np.isnan(values)
        return self["tokens"][there], values[there]


class StepReader:
    """Reads a metrics file once: trained steps become columns; validations and guard actions stay records.

    A duplicate step counts once, as it ran last. Raises DetourError for a figure that is not a number.
    """

    def __init__(self, path: Path, validation_figures: tuple[str, ...]) -> None:
        self._path, self._validation_figures = path, validation_figures
        self._numbers = array("q")
        self._columns = {figure: array("d") for figure in FIGURES}
        self._validations: dict[int, Record] = {}
        self._guarded: dict[int, Record] = {}
        if path.exists():
            for line, (_, record) in enumerate(metrics_lines(path), start=1):
                self._take(line, record)

    def _take(self, line: int, record: Record) -> None:
        step = record["step"]
        if not -1 < step < LARGEST_STEP:
            raise DetourError(f"{self._path}, line {line}: invalid step {step:.3g}; remove the line")
        if step:
            self._numbers.append(step)
            for figure, column in self._columns.items():
                column.append(self._number(line, figure, record.get(figure)))
            self._keep(self._guarded, step, self._guard(record))
        self._keep(self._validations, step, self._validation(line, record))

    def _number(self, line: int, figure: str, value: Any) -> float:
        if value is None:
            return math.nan
        if type(value) is float or (type(value) is int and abs(value) < LARGEST_STEP):
            return value
        raise DetourError(f"{self._path}, line {line}: {figure} is not a valid number; remove the line")

    def _keep(self, kept: dict[int, Record], step: int, record: Record) -> None:
        kept.pop(step, None)
        if record:
            kept[step] = {"step": step, **record}

    def _guard(self, record: Record) -> Record:
        said = {key: record[key] for key in ("skipped", "spike") if record.get(key)}
        return {key: str(value) for key, value in {"phase": record.get("phase") or "–", **said}.items()} if said else {}

    def _validation(self, line: int, record: Record) -> Record:
        held = {
            key: self._number(line, key, value)
            for key, value in record.items()
            if key.startswith("val_") and key.partition("/")[0] in self._validation_figures
        }
        return {key: value for key, value in held.items() if math.isfinite(value)}

    def steps(self) -> Steps:
        if not self._numbers:
            return Steps.none()
        numbers = np.frombuffer(self._numbers, np.int64)
        columns = {figure: np.frombuffer(values, np.float64) for figure, values in self._columns.items()}
        if (np.diff(numbers) <= 0).any():
            order = np.argsort(numbers, kind="stable")
            order = order[np.append(np.diff(numbers[order]) > 0, True)]
            numbers, columns = numbers[order], {figure: values[order] for figure, values in columns.items()}
        kept = {}
        for figure, values in columns.items():
            finite = np.isfinite(values)
            if finite.any():  # infinite figures are not plotted
                kept[figure] = values if finite.all() else np.where(finite, values, np.nan)
        return Steps(numbers, kept)

    def validations(self) -> list[Record]:
        return [self._validations[step] for step in sorted(self._validations)]

    def guarded(self) -> list[Record]:
        return [self._guarded[step] for step in sorted(self._guarded)]
