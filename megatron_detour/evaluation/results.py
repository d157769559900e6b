"""The results of an evaluation: OUTPUT/results.jsonl, one line per fine-tuning, and the predictions beside it."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from megatron_detour.errors import DetourError
from megatron_detour.files import write_whole
from megatron_detour.structured import parse_json

RESULTS = "results.jsonl"
Result = dict[str, Any]


class _Shape(msgspec.Struct):
    """The types of the keys that are read; keys of later versions are ignored."""

    model: str
    task: str
    seed: int
    shuffled: bool
    path: str = ""
    protocol: str = ""
    title: str = ""
    language: str = ""
    ner_head: str | None = None
    metric: str = ""
    score: float | None = None
    scores: dict[str, float] = {}
    dev_score: float = 0.0
    examples: dict[str, int] = {}
    seconds: float = 0.0
    device: str | None = None
    attention: str | None = None
    versions: dict[str, str] | None = None
    identity: dict[str, str] = {}


class Cell(NamedTuple):
    """The model, task, seed and labels of a result."""

    model: str
    task: str
    seed: int
    shuffled: bool = False

    @classmethod
    def from_result(cls, result: Result) -> Cell:
        return cls(result["model"], result["task"], result["seed"], result["shuffled"])

    def __str__(self) -> str:
        return f"{self.model}, {self.task}, seed {self.seed}{', shuffled labels' if self.shuffled else ''}"


def read_results(output: Path) -> dict[Cell, Result]:
    """Return the results by cell, the latest if a cell has several. Raises DetourError for any other file.

    A truncated last line is skipped; its cell is run again.
    """
    path = output / RESULTS
    if not path.exists():
        return {}
    results: dict[Cell, Result] = {}
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise DetourError(f"{path}: cannot read: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        try:
            result = parse_json(line.decode(), str(path))
            msgspec.convert(result, _Shape)
        except (DetourError, UnicodeDecodeError, msgspec.ValidationError) as fault:
            reason = " ".join(str(fault).removeprefix(f"{path}: ").split()).replace("$.", "")
            raise DetourError(
                f"{path}, line {number}: not a result of megatron-detour evaluate ({reason}); remove the line"
            ) from None
        names = [result[key] for key in ("model", "task")]
        if not all(name.isprintable() and name and "/" not in name and name[0] != "." for name in names):
            raise DetourError(
                f"{path}, line {number}: invalid model or task name {names[0]!r} or {names[1]!r}; remove the line"
            )
        results[Cell.from_result(result)] = result
    return results


def predictions_path(output: Path, cell: Cell) -> Path:
    name = f"{cell.seed}-shuffled.json" if cell.shuffled else f"{cell.seed}.json"
    return output / "predictions" / cell.model / cell.task / name


def add_result(output: Path, result: Result, predictions: dict[str, Any]) -> None:
    """Write the predictions, then the line, so that every line has its predictions. Safe with concurrent writers."""
    path = predictions_path(output, Cell.from_result(result))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(predictions, ensure_ascii=False))
    descriptor = os.open(output / RESULTS, os.O_RDWR | os.O_CREAT, 0o666)
    with os.fdopen(descriptor, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        content = file.read()
        file.seek(content.rfind(b"\n") + 1)  # overwrite a truncated last line
        file.truncate()
        file.write(json.dumps(result, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
