"""Where the record of each step goes: a JSON-lines file and TensorBoard."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, Protocol

from megatron_detour.errors import DetourError
from megatron_detour.files import write_whole

Record = dict[str, Any]

GROUPS = {
    "tokens_per_second": "speed",
    "seconds": "speed",
    "data_wait_seconds": "speed",
    "memory_bytes": "speed",
    "labelled_tokens": "data",
    "padding_share": "data",
    "data_crc": "data",
}


class Sink(Protocol):
    """Takes one record a step, in the order of the steps."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class MetricsFile:
    """Appends one JSON object a line to `path`.

    Opening removes every line with a step above `resume_step` and a torn last line, so that a resumed run
    holds each step once. Raises DetourError where a line before the last is unreadable.
    """

    def __init__(self, path: Path | str, resume_step: int) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            kept = [line for line, record in _read_lines(self.path) if record["step"] <= resume_step]
            write_whole(self.path, b"".join(line + b"\n" for line in kept))
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Writes and flushes one line. Raises ValueError, writing nothing, where a figure is NaN or infinite."""
        self._file.write(_line(record))
        self._file.flush()

    def close(self) -> None:
        """Brings the file to the disk and closes it; a second call does nothing."""
        if self._file.closed:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


class TensorBoardSink:
    """Writes event files under `folder`; the points of an earlier session after `resume_step` are hidden.

    Raises DetourError where the tensorboard package is missing.
    """

    def __init__(self, folder: Path | str, resume_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise DetourError("TensorBoard files need the package tensorboard: pip install tensorboard") from error
        self._writer = SummaryWriter(log_dir=str(folder), purge_step=resume_step + 1, flush_secs=30)

    def write(self, record: Record) -> None:
        """Logs every numeric field of the record at x = its step; text and missing figures are left out."""
        for field, value in record.items():
            if field != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                self._writer.add_scalar(tensorboard_tag(field), value, record["step"])

    def close(self) -> None:
        self._writer.close()


def tensorboard_tag(field: str) -> str:
    """Returns the tag of a record's field, e.g. ``val/mlm_loss`` for ``val_mlm_loss``."""
    if field.startswith("val_"):
        return f"val/{field.removeprefix('val_')}"
    return f"{GROUPS.get(field, 'train')}/{field}"


def read_metrics(path: Path | str) -> list[Record]:
    """Returns the records of a metrics file, without a torn last line.

    Raises DetourError where the file is missing or a line before the last is no record.
    """
    return [record for _, record in _read_lines(Path(path))]


def _read_lines(path: Path) -> list[tuple[bytes, Record]]:
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError as error:
        raise DetourError(f"{path} is missing; is this the folder of a run?") from error
    kept: list[tuple[bytes, Record]] = []
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is not None:
            kept.append((line, record))
        elif number < len(lines):
            raise DetourError(f"{path}, line {number} is no record of a step; remove that line or restore the file")
    return kept


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:  # also what a character cut in half raises
        return None
    if isinstance(record, dict) and type(record.get("step")) is int:
        return record
    return None


def _line(record: Record) -> str:
    if type(record.get("step")) is not int:
        raise ValueError("a record needs an integer step")
    for field, value in record.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"step {record['step']}: {field} is {value}, which is not a finite number")
    return json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n"
