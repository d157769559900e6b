"""Read a task's JSON Lines files into examples of its type; errors name the file and line."""

from __future__ import annotations

import gzip
import hashlib
import json
import unicodedata
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_detour.errors import DetourError, nearest
from megatron_detour.evaluation.task import Task
from megatron_detour.evaluation.task_types.base import VECTOR, BadExample, Record, Seen
from megatron_detour.evaluation.task_types.encode import Example
from megatron_detour.structured import parse_json

SPLITS = ("train", "dev", "test")
ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Dataset:
    """The examples of a task's three splits, in file order; the TaskType defines what an example is.

    `labels` are the model's output labels (TaskType.model_labels), () for tasks without a fixed label set.
    `sha256` is the hash of the files' uncompressed bytes.
    """

    task: Task
    train: list[Example]
    dev: list[Example]
    test: list[Example]
    labels: tuple[str, ...]
    sha256: str


def read_dataset(task: Task, data: Path) -> Dataset:
    """Read DATA/NAME/{train,dev,test}.jsonl or .jsonl.gz (or .json with one object per line).

    Raises DetourError for a missing folder or file, an invalid line, an empty split, and a label that neither the
    training split nor the task's `labels` contain.
    """
    folder = data / task.name
    if not folder.is_dir():
        raise DetourError(
            f"{folder}: no such folder; put train.jsonl, dev.jsonl and test.jsonl of task {task.name} there "
            "(see docs/tasks.md)"
        )
    paths = {split: _path_of(folder, split) for split in SPLITS}
    reader = _Reader(task)
    digest = hashlib.sha256()
    splits = {}
    for split, path in paths.items():
        content = _content(path)
        digest.update(f"{split} {len(content)}\n".encode() + content)
        splits[split] = reader.split(path, content)
        if split == "train":
            reader.learn_labels(splits[split], path)
    return Dataset(task, **splits, labels=reader.model_labels(), sha256=digest.hexdigest())


def _path_of(folder: Path, split: str) -> Path:
    names = [f"{split}{ending}" for ending in ENDINGS]
    present = [name for name in names if (folder / name).is_file()]
    if not present:
        content = sorted(path.name for path in folder.iterdir())[:8]
        contains = f"contains {', '.join(content)}" if content else "is empty"
        raise DetourError(f"{folder}: none of {', '.join(names)} exists; the folder {contains}")
    if len(present) > 1:
        raise DetourError(f"{folder}: both {present[0]} and {present[1]} exist; keep one of them")
    return folder / present[0]


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DetourError(f"{path}: cannot read the whole file: {error}") from None


class _Reader:
    """Reads the splits of one task, the training split first: it determines pairs and labels."""

    def __init__(self, task: Task) -> None:
        self.task, self.kind = task, task.kind
        self.seen = Seen(pairs=True if self.kind.always_pairs or "text_b" in task.fields else None)
        self.known: set[str] | None = set(task.labels) or None

    def split(self, path: Path, content: bytes) -> list[Example]:
        examples = []
        for number, line in _lines(content):
            place = f"{path}, line {number:,}"
            try:
                example = self.kind.read(Record(_object(line, place), self.task.fields, self.seen))
                self.check_labels(example)
            except BadExample as reason:
                raise DetourError(f"{place}: {reason}") from None
            examples.append(example)
        if not examples:
            raise DetourError(f"{path}: no examples; every split needs at least one")
        return examples

    def learn_labels(self, train: list[Example], path: Path) -> None:
        """Use the labels of the training split unless the task lists its labels."""
        if not self.kind.label_noun:
            return
        if self.seen.maybe_vectors and not self.task.labels and len(self.seen.list_lengths) == 1:
            raise DetourError(f"{path}: {VECTOR}")
        labels = set().union(*(self.kind.labels_of(example) for example in train))
        _refuse_look_alikes(labels, path)
        if len(labels) < self.kind.fewest_labels:
            count = f"only the label {labels.pop()!r}" if labels else "no labels"
            raise DetourError(f"{path}: {count}, so there is nothing to learn")
        self.known = self.known or labels

    def check_labels(self, example: Example) -> None:
        if self.known is None or not self.kind.label_noun:
            return
        for label in sorted(self.kind.labels_of(example) - self.known):
            name, hint = f"the {self.kind.label_noun} {label!r}", nearest(label, list(self.known))
            if self.task.labels:
                raise BadExample(f"{name} is missing from the task's labels{hint}")
            raise BadExample(
                f"{name} is not in the training split{hint}; to evaluate on it anyway, list all labels under "
                "labels in the task's YAML file"
            )

    def model_labels(self) -> tuple[str, ...]:
        return self.kind.model_labels(sorted(self.known or ()))


def _lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield line numbers and non-blank lines. Split at line feeds only: texts may contain other line ends."""
    for number, line in enumerate(content.removeprefix(_BYTE_ORDER_MARK).split(b"\n"), start=1):
        if line.strip():
            yield number, line


def _object(line: bytes, place: str) -> Example:
    if line.lstrip().startswith(b"["):
        raise BadExample("not a JSON object; write one object per line, not a list of objects")
    try:
        text = line.decode("utf-8")
        record = parse_json(text, place)
        if "\\u" in text:  # an escape may be a lone surrogate, which no tokenizer accepts
            json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError:
        raise BadExample("not UTF-8") from None
    except UnicodeEncodeError:
        raise BadExample("contains a lone surrogate") from None
    if not isinstance(record, dict):
        raise BadExample("not a JSON object; write one object per line")
    return record


def _refuse_look_alikes(labels: set[str], path: Path) -> None:
    """Raise DetourError for two labels that are visually identical."""
    seen: dict[str, str] = {}
    for label in sorted(labels):
        shown = " ".join(
            "".join(c for c in unicodedata.normalize("NFC", label) if c.isprintable() or c.isspace()).split()
        )
        if shown in seen:
            raise DetourError(f"{path}: the labels {seen[shown]!a} and {label!a} look alike; spell them the same way")
        seen[shown] = label
