"""A task's data: JSON Lines into examples of its type, with every doubtful line refused by its number."""

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
    """The examples of a task's three splits, in the files' order; their TaskType says what an example is.

    `labels` are what a model chooses from (TaskType.model_labels), () where answers are no labels of a fixed set.
    `sha256` is that of the files' uncompressed bytes.
    """

    task: Task
    train: list[Example]
    dev: list[Example]
    test: list[Example]
    labels: tuple[str, ...]
    sha256: str


def read_dataset(task: Task, data: Path) -> Dataset:
    """Reads DATA/NAME/{train,dev,test}.jsonl or .jsonl.gz (or .json with an object a line).

    Raises DetourError for a folder or file that is not there, a line that is no example of the task's type, an empty
    split, and a label that the training split lacks and the task does not list.
    """
    folder = data / task.name
    if not folder.is_dir():
        raise DetourError(
            f"{folder}: there is no such folder; the task {task.name} needs its data there, as train.jsonl, dev.jsonl "
            "and test.jsonl (docs/tasks.md describes them)"
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
            reader.know_labels(splits[split], path)
    return Dataset(task, **splits, labels=reader.model_labels(), sha256=digest.hexdigest())


def _path_of(folder: Path, split: str) -> Path:
    names = [f"{split}{ending}" for ending in ENDINGS]
    there = [name for name in names if (folder / name).is_file()]
    if not there:
        others = sorted(path.name for path in folder.iterdir())[:8]
        holds = f"it holds {', '.join(others)}" if others else "it is empty"
        raise DetourError(f"{folder}: has none of {', '.join(names)}; {holds}")
    if len(there) > 1:
        raise DetourError(f"{folder}: has both {there[0]} and {there[1]}; keep the one that is meant")
    return folder / there[0]


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DetourError(f"{path}: cannot be read to its end: {error}") from None


class _Reader:
    """Reads the splits of one task, the training split first: it decides on pairs and labels."""

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
            raise DetourError(f"{path}: has no examples; every split needs at least one")
        return examples

    def know_labels(self, train: list[Example], path: Path) -> None:
        """Takes the labels of the training split for the task's where it does not list its own."""
        if not self.kind.label_noun:
            return
        if self.seen.maybe_vectors and not self.task.labels and len(self.seen.list_lengths) == 1:
            raise DetourError(f"{path}: {VECTOR}")
        labels = set().union(*(self.kind.labels_of(example) for example in train))
        _refuse_look_alikes(labels, path)
        if len(labels) < self.kind.fewest_labels:
            what = f"only the label {labels.pop()!r}" if labels else "no label"
            raise DetourError(f"{path}: has {what}, so there is nothing to learn")
        self.known = self.known or labels

    def check_labels(self, example: Example) -> None:
        if self.known is None or not self.kind.label_noun:
            return
        for label in sorted(self.kind.labels_of(example) - self.known):
            what, hint = f"the {self.kind.label_noun} {label!r}", nearest(label, list(self.known))
            if self.task.labels:
                raise BadExample(f"{what} is not under labels of the task{hint}")
            raise BadExample(
                f"{what} is not in the training split{hint}; to evaluate on it all the same, list all labels under "
                "labels in the task's YAML file"
            )

    def model_labels(self) -> tuple[str, ...]:
        return self.kind.model_labels(sorted(self.known or ()))


def _lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Numbers and lines that are not blank. Only line feeds end a line: texts hold other line ends."""
    for number, line in enumerate(content.removeprefix(_BYTE_ORDER_MARK).split(b"\n"), start=1):
        if line.strip():
            yield number, line


def _object(line: bytes, place: str) -> Example:
    if line.lstrip().startswith(b"["):
        raise BadExample("not a JSON object; write one object a line, not a list of them")
    try:
        text = line.decode("utf-8")
        record = parse_json(text, place)
        if "\\u" in text:  # an escape can be half of a pair, which no tokenizer takes
            json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError:
        raise BadExample("not UTF-8") from None
    except UnicodeEncodeError:
        raise BadExample("holds half a surrogate pair") from None
    if not isinstance(record, dict):
        raise BadExample("not a JSON object; write one object a line")
    return record


def _refuse_look_alikes(labels: set[str], path: Path) -> None:
    """Raises DetourError for two labels that differ in nothing that is seen."""
    seen: dict[str, str] = {}
    for label in sorted(labels):
        shown = " ".join(
            "".join(c for c in unicodedata.normalize("NFC", label) if c.isprintable() or c.isspace()).split()
        )
        if shown in seen:
            raise DetourError(f"{path}: the labels {seen[shown]!a} and {label!a} look alike; write them one way")
        seen[shown] = label
