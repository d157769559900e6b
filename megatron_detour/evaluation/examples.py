"""A task's data: JSON Lines into examples of one form for each type, with every doubtful line refused by its number."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import re
import unicodedata
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_detour.errors import DetourError, nearest
from megatron_detour.evaluation.task import WITH_LABELS, Task
from megatron_detour.structured import parse_json

SPLITS = ("train", "dev", "test")
ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
Example = dict[str, Any]
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BIO = re.compile(r"O|[BI]-\S.*")


@dataclass(frozen=True)
class Dataset:
    """The examples of a task's three splits, in the files' order.

    An example of token-classification is {"tokens": [str], "tags": [str]}, of classification {"text": str, "text_b":
    str | None, "label": str}, of multi-label {"text", "text_b", "labels": [str]}, of similarity {"text", "text_b",
    "score": float}, of multiple-choice and multiple-answer {"question": str, "options": [str], "answers": [int]} with
    the right options' numbers from 0.

    `labels` are what a model chooses from: tags ("O", then B-X and I-X of all types in alphabetical order), labels in
    alphabetical order, or () for the other types. `sha256` is that of the files' uncompressed bytes.
    """

    task: Task
    train: list[Example]
    dev: list[Example]
    test: list[Example]
    labels: tuple[str, ...]
    sha256: str


ZEROS_ONES = ("0", "1", "0.0", "1.0", "False", "True")
VECTOR = "labels are names; this looks like a vector of 0 and 1: list the names of the labels that apply"


class _BadLine(ValueError):
    """A line that is no example; the message says why."""


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
    return Dataset(task, **splits, labels=reader.label_list(), sha256=digest.hexdigest())


def train_test_duplicates(dataset: Dataset) -> int:
    """How many different inputs of the test split are in the training split too, whatever their labels.

    An input is the words, the text or both texts, or the question without its options.
    """
    return len({_input(example) for example in dataset.test} & {_input(example) for example in dataset.train})


def _input(example: Example) -> tuple[str | None, ...]:
    if "tokens" in example:
        return (" ".join(example["tokens"]),)
    return (example["question"],) if "question" in example else (example["text"], example["text_b"])


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
        self.task = task
        self.pairs: bool | None = True if task.type == "similarity" or "text_b" in task.fields else None
        self.known: set[str] | None = set(task.labels) or None  # labels, in token-classification types of entities
        self.tags = {"O"}  # found to be good
        self.vectors = True  # whether all lists of labels or answers so far are as long, of 0 and 1 alone
        self.lengths: set[int] = set()
        self.kinds: dict[str, type] = {}  # of labels: numbers or texts

    def split(self, path: Path, content: bytes) -> list[Example]:
        examples = []
        for number, line in _lines(content):
            place = f"{path}, line {number:,}"
            try:
                example = self.example(_record(line, place))
                self.check_labels(example)
            except _BadLine as reason:
                raise DetourError(f"{place}: {reason}") from None
            examples.append(example)
        if not examples:
            raise DetourError(f"{path}: has no examples; every split needs one at least")
        return examples

    def know_labels(self, train: list[Example], path: Path) -> None:
        """Takes the labels of the training split for the task's where it does not list its own."""
        if self.task.type not in WITH_LABELS:
            return
        if self.vectors and not self.task.labels and len(self.lengths) == 1:
            raise DetourError(f"{path}: {VECTOR}")
        found = set().union(*(_labels(example) for example in train))
        _refuse_look_alikes(found, path)
        if len(found) < (2 if self.task.type == "classification" else 1):
            what = f"the label {found.pop()!r} alone" if found else "no label"
            raise DetourError(f"{path}: has {what}, so there is nothing to learn")
        self.known = self.known or found

    def check_labels(self, example: Example) -> None:
        if self.known is None or self.task.type not in WITH_LABELS:
            return
        for label in sorted(_labels(example) - self.known):
            what = "type of entity" if "tags" in example else "label"
            if self.task.labels:
                raise _BadLine(
                    f"the {what} {label!r} is not under labels of the task{nearest(label, list(self.known))}"
                )
            raise _BadLine(
                f"the {what} {label!r} is not in the training split{nearest(label, list(self.known))}; if a model "
                "shall be judged by it all the same, list all under labels in the task's YAML file"
            )

    def label_list(self) -> tuple[str, ...]:
        names = sorted(self.known or ())
        if self.task.type == "token-classification":
            return ("O", *(f"{prefix}-{name}" for name in names for prefix in "BI"))
        return tuple(names)

    def example(self, record: Example) -> Example:
        kind = self.task.type
        if kind == "token-classification":
            return self._tagged(record)
        if kind in ("multiple-choice", "multiple-answer"):
            return self._question(record)
        example: Example = {"text": self._text(record, "text"), "text_b": self._second_text(record)}
        if kind == "classification":
            key, value = self._value(record, "label")
            return example | {"label": self._name(key, value)}
        if kind == "multi-label":
            key, value = self._value(record, "labels")
            self._look_for_vectors(_list(key, value))
            return example | {"labels": _once(key, [self._name(key, label) for label in value])}
        return example | {"score": _score(*self._value(record, "score"))}

    def _name(self, key: str, value: Any) -> str:
        """A label, which is a number everywhere or a text everywhere: 1 and "1" are not the same."""
        label = _label(key, value)
        if self.kinds.setdefault(label, type(value)) is not type(value):
            raise _BadLine(f"the label {label!r} is a number in one line and a text in another; write it one way")
        return label

    def _look_for_vectors(self, values: list[Any]) -> None:
        """Raises _BadLine for what can only be a vector of 0 and 1; notes what may be one (know_labels)."""
        ones = [value for value in values if isinstance(value, bool | int | float | str) and str(value) in ZEROS_ONES]
        if not values or len(ones) < len(values):
            self.vectors = False
        elif any(isinstance(value, bool | float) for value in values) or len(set(map(str, values))) < len(values):
            raise _BadLine(VECTOR)
        self.lengths.add(len(values))

    def _value(self, record: Example, canonical: str) -> tuple[str, Any]:
        key = self.task.key(canonical)
        if key not in record:
            raise _BadLine(
                f"no key {key!r}{nearest(key, list(record))}; where the files call it otherwise, the task's YAML file "
                f"says so: fields: {{{canonical}: KEY}}"
            )
        return key, record[key]

    def _text(self, record: Example, canonical: str) -> str:
        return _text(*self._value(record, canonical))

    def _second_text(self, record: Example) -> str | None:
        key = self.task.key("text_b")
        has_one = record.get(key) is not None
        if self.pairs is None:
            self.pairs = has_one
        if has_one and not self.pairs:
            raise _BadLine(f"has a second text under {key!r}, which the first line of the training split lacks")
        return self._text(record, "text_b") if self.pairs else None

    def _tagged(self, record: Example) -> Example:
        (key, tokens), (tags_key, tags) = self._value(record, "tokens"), self._value(record, "tags")
        for name, values in ((key, tokens), (tags_key, tags)):
            if not all(isinstance(value, str) for value in _list(name, values)):
                raise _BadLine(f"the values of {name!r} are not all texts")
        if len(tokens) != len(tags):
            raise _BadLine(f"{len(tokens)} values under {key!r}, but {len(tags)} under {tags_key!r}")
        if not tokens:
            raise _BadLine(f"nothing under {key!r}; leave out sentences without words")
        for tag in set(tags) - self.tags:
            if not _BIO.fullmatch(tag):
                raise _BadLine(f"the tag {tag!r} is none of BIO: O, B-TYPE or I-TYPE")
            self.tags.add(tag)
        return {"tokens": tokens, "tags": tags}

    def _question(self, record: Example) -> Example:
        question = self._text(record, "question")
        key, options = self._value(record, "options")
        if not isinstance(options, dict | list):
            raise _BadLine(f"the value of {key!r} is neither an object nor a list of options")
        if len(options) < 2:
            raise _BadLine(f"{len(options)} options; a choice needs two at least")
        # the names by which answers may call them: keys, or numbers from 0
        names = list(options) if isinstance(options, dict) else [str(i) for i in range(len(options))]
        texts = [_text(key, text) for text in (options.values() if isinstance(options, dict) else options)]
        key, answers = self._value(record, "answers")
        if isinstance(answers, list) and self.task.type == "multiple-answer":
            self._look_for_vectors(answers)
        answers = _once(key, [_label(key, answer) for answer in (answers if isinstance(answers, list) else [answers])])
        for answer in answers:
            if answer not in names:
                raise _BadLine(f"the answer {answer!r} names no option; there are {', '.join(names)}")
        if not answers or (len(answers) > 1 and self.task.type == "multiple-choice"):
            raise _BadLine(
                f"{len(answers)} right answers; {self.task.type} needs "
                f"{'exactly one' if self.task.type == 'multiple-choice' else 'one at least'}"
            )
        return {"question": question, "options": texts, "answers": sorted(map(names.index, answers))}


def _lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Numbers and lines that are not blank. Only line feeds end a line: texts hold other line ends."""
    for number, line in enumerate(content.removeprefix(_BYTE_ORDER_MARK).split(b"\n"), start=1):
        if line.strip():
            yield number, line


def _record(line: bytes, place: str) -> Example:
    if line.lstrip().startswith(b"["):
        raise _BadLine("not a JSON object; write one object a line, not a list of them")
    try:
        text = line.decode("utf-8")
        record = parse_json(text, place)
        if "\\u" in text:  # an escape can be half of a pair, which no tokenizer takes
            json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError:
        raise _BadLine("not UTF-8") from None
    except UnicodeEncodeError:
        raise _BadLine("holds half a surrogate pair") from None
    if not isinstance(record, dict):
        raise _BadLine("not a JSON object; write one object a line")
    return record


def _labels(example: Example) -> set[str]:
    if "tags" in example:
        return {tag[2:] for tag in example["tags"] if tag != "O"}
    return {example["label"]} if "label" in example else set(example["labels"])


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


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _BadLine(f"the value of {key!r} is {_shown(value)}, not a text")
    if not value.strip():
        raise _BadLine(f"the text under {key!r} is blank")
    return value


def _list(key: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _BadLine(f"the value of {key!r} is {_shown(value)}, not a list")
    return value


def _label(key: str, value: Any) -> str:
    if isinstance(value, bool) or (isinstance(value, str) and not value.strip()) or not isinstance(value, str | int):
        raise _BadLine(f"{_shown(value)} under {key!r}, where a name or a whole number is needed")
    return str(value)


def _score(key: str, value: Any) -> float:
    try:
        if not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except (TypeError, OverflowError):
        pass
    raise _BadLine(f"{_shown(value)} under {key!r}, where a number is needed")


def _once(key: str, values: list[str]) -> list[str]:
    for i, value in enumerate(values):
        if value in values[:i]:
            raise _BadLine(f"{value!r} stands twice under {key!r}")
    return values


def _shown(value: Any) -> str:
    """What a value is, without its content where that may be private."""
    if isinstance(value, str | list | dict):
        kind = {str: "a text", list: "a list", dict: "an object"}[type(value)]
        return kind if value else f"{kind} without anything in it"
    return json.dumps(value)[:20]
