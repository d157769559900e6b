"""Sinks for the records of steps: a JSON Lines file, TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
import math
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from megatron_detour.errors import DetourError, brief
from megatron_detour.files import retry, write_whole
from megatron_detour.structured import read_json_object

Record = dict[str, Any]

COUNTED = ("skipped", "spike")  # text fields with a reason; TensorBoard and wandb get their counts
FLUSH_SECONDS = 30  # for TensorBoard
GROUPS = {
    "tokens_per_second": "speed",
    "model_tflops": "speed",
    "mfu": "speed",
    "seconds": "speed",
    "data_wait_seconds": "speed",
    "memory_bytes": "speed",
    "sequences": "data",
    "labelled_tokens": "data",
    "padding_share": "data",
    "data_crc": "data",
}


class Sink(Protocol):
    """Receives one record per step, in order."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class MetricsFile:
    """Appends one JSON object per line to `path`.

    Opening removes lines with a step above `resume_step`, duplicates and a truncated last line, so that a resumed run
    has each step once; `counts` is the number of kept steps that were skipped or had a spike. Raises DetourError if a
    line before the last is unreadable, and OSError with the file's name if writing fails.
    """

    def __init__(self, path: Path | str, resume_step: int) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.counts = dict.fromkeys(COUNTED, 0)
        self._gaps = [(1, resume_step)] if resume_step > 0 else []
        with _naming(self.path):
            if self.path.exists():
                retry(lambda: write_whole(self.path, self._kept(resume_step)))
            self._file = self.path.open("ab", buffering=0)

    @property
    def missing(self) -> str:
        """The earlier steps without a line, for instance "3, 7-9", or ""."""
        return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in self._gaps)

    def _kept(self, resume_step: int) -> Iterator[bytes]:
        """Yield the lines up to `resume_step` one at a time, to save memory for long runs."""
        self.counts, self._gaps, done = dict.fromkeys(COUNTED, 0), [], 0
        for line, record in _in_order(self.path):
            if record["step"] <= resume_step:
                if record["step"] > done + 1:
                    self._gaps.append((done + 1, record["step"] - 1))
                done = record["step"]
                for field in COUNTED:
                    self.counts[field] += bool(record.get(field))
                yield line + b"\n"
        if done < resume_step:
            self._gaps.append((done + 1, resume_step))

    def write(self, record: Record) -> None:
        """Write one line. Raises ValueError, without writing, if a figure is NaN or infinite."""
        left = _line(record).encode()
        with _naming(self.path):
            while left:  # after an error, continue with the unwritten rest
                left = left[retry(lambda rest=left: self._file.write(rest)) :]

    def close(self) -> None:
        """Flush the file to disk and close it; further calls do nothing."""
        if self._file.closed:
            return
        with _naming(self.path):
            try:
                retry(lambda: os.fsync(self._file.fileno()))
            finally:
                self._file.close()


class TensorBoardSink:
    """Writes event files under `folder`; points of an earlier session after `resume_step` are hidden.

    `counts` come from MetricsFile. A step is one event, and the file name does not contain the host name, unlike that
    of torch's SummaryWriter. Raises DetourError if the tensorboard package is missing.
    """

    def __init__(self, folder: Path | str, resume_step: int, counts: dict[str, int] | None = None) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            raise DetourError("TensorBoard requires the package tensorboard: pip install tensorboard") from error
        self._folder = Path(folder)
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._numbers = _Numbers(counts)
        self._flushed = time.monotonic()
        with _naming(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            # TensorBoard reads files in the order of their names.
            self._file = RecordWriter((self._folder / f"events.out.tfevents.{time.time_ns()}").open("xb"))
            self._add(file_version="brain.Event:2")
            begun = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._add(step=resume_step + 1, session_log=begun)
            self._file.flush()

    def write(self, record: Record) -> None:
        """Log every numeric field of the record at its step; text and missing figures are omitted."""
        values = [
            self._summary.Value(tag=name, simple_value=value) for name, value in self._numbers.convert(record).items()
        ]
        with _naming(self._folder):
            self._add(step=record["step"], summary=self._summary(value=values))
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                self._file.flush()
                self._flushed = time.monotonic()

    def _add(self, **fields: Any) -> None:
        self._file.write(self._event(wall_time=time.time(), **fields).SerializeToString())

    def close(self) -> None:
        with _naming(self._folder):
            self._file.close()


class WandbSink:
    """Sends the figures of a run to Weights & Biases, or stores them in `folder`/wandb with ``mode: offline``.

    `settings` are arguments of wandb.init (project, entity, group, tags, mode, ...). The run's id is stored in
    `folder`/wandb.json, so that every session resumes the same wandb run. Figures are plotted over the field `step`,
    not over wandb's step counter, which accepts each step only once: steps that a session repeats after `resume_step`
    (in the run's config) are logged beside the earlier ones. Neither code nor terminal output is sent.
    Raises DetourError if the package is missing or wandb rejects the run.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        folder: Path | str,
        name: str,
        resume_step: int,
        counts: dict[str, int] | None = None,
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise DetourError("Weights & Biases requires the package wandb: pip install wandb") from error
        self._numbers = _Numbers(counts)
        private = wandb.Settings(console="off", disable_code=True, disable_git=True, save_code=False)
        kept = {"id": _wandb_id(Path(folder)), "resume": "allow", "dir": str(folder), "settings": private}
        try:
            self._run = wandb.init(**{"name": name, **settings, **kept})
            self._run.config.update({"resumed_after_step": max(resume_step, 0)}, allow_val_change=True)
            self._run.define_metric("step", hidden=True)
            self._run.define_metric("*", step_metric="step")
        except (wandb.Error, TypeError, ValueError) as error:
            raise DetourError(
                f"wandb: {brief(error)}; correct its settings, or set mode: offline and run wandb sync later"
            ) from error

    def write(self, record: Record) -> None:
        """Log every numeric field of the record; text and missing figures are omitted."""
        self._run.log({**self._numbers.convert(record), "step": record["step"]})

    def close(self) -> None:
        self._run.finish()


class _Numbers:
    """Converts records to numbers by tag, for TensorBoard and wandb; counts continue from `counts`."""

    def __init__(self, counts: dict[str, int] | None) -> None:
        self._counts = {field: (counts or {}).get(field, 0) for field in COUNTED}
        self._tag = cache(tensorboard_tag)

    def convert(self, record: Record) -> dict[str, float]:
        for field in COUNTED:
            self._counts[field] += bool(record.get(field))
        trained = record["step"] > 0
        fields = {**record, **self._counts} if trained else record
        return {
            self._tag(field): value
            for field, value in fields.items()
            if field != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
        }


def _wandb_id(folder: Path) -> str:
    path = folder / "wandb.json"
    try:
        known = read_json_object(path).get("id")
        if not isinstance(known, str) or not known:
            raise DetourError(f"{path}: no wandb run id")
        return known
    except FileNotFoundError:
        made = secrets.token_hex(4)
    except DetourError as fault:
        raise DetourError(f"{fault}; restore it, or remove it to start a new wandb run") from None
    folder.mkdir(parents=True, exist_ok=True)
    with _naming(path):
        write_whole(path, json.dumps({"id": made}) + "\n")
    return made


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Add the file name to an OSError without one, such as for a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def tensorboard_tag(field: str) -> str:
    """Return the tag of a record's field, e.g. ``val/mlm_loss`` for ``val_mlm_loss``."""
    if field.startswith("val_"):
        return f"val/{field.removeprefix('val_')}"
    return f"{GROUPS.get(field, 'train')}/{field}"


def read_metrics(path: Path | str) -> list[Record]:
    """Return the records of a metrics file, without a truncated last line.

    Raises DetourError if the file is missing or a line before the last is invalid.
    """
    return [record for _, record in metrics_lines(Path(path))]


def metrics_lines(path: Path) -> Iterator[tuple[bytes, Record]]:
    """Yield each line with its record, without a truncated last line. Raises DetourError like read_metrics."""
    try:
        file = path.open("rb")
    except FileNotFoundError as error:
        raise DetourError(f"{path}: no such file; is this a run directory?") from error
    with file:
        unread = 0  # the number of an invalid line; truncated if it is the last one
        for number, line in enumerate(file, start=1):
            if unread:
                raise DetourError(f"{path}, line {unread}: not a step record; remove the line or restore the file")
            record = _parse(line)
            if record is None:
                unread = number
            else:
                yield line.rstrip(b"\r\n"), record


def _in_order(path: Path) -> Iterator[tuple[bytes, Record]]:
    """Yield the last line of each step; all lines are held in memory only if they are out of order."""
    steps = [record["step"] for _, record in metrics_lines(path)]
    if all(before < after for before, after in pairwise(steps)):
        return metrics_lines(path)
    by_step = {record["step"]: (line, record) for line, record in metrics_lines(path)}
    return iter([by_step[step] for step in sorted(by_step)])


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # includes UnicodeDecodeError for a truncated character
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
