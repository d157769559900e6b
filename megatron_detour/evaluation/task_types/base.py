"""What a kind of task is: all that differs between kinds in one class, and the reader of a line of its files."""

from __future__ import annotations

import json
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_detour.errors import nearest
from megatron_detour.evaluation.metrics import Metric
from megatron_detour.evaluation.task_types.encode import Encoder, Example, Feature, pad_features

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

ZEROS_ONES = ("0", "1", "0.0", "1.0", "False", "True")
VECTOR = "labels are names; this looks like a vector of 0 and 1: list the names of the labels that apply"


class TaskType(ABC):
    """One kind of task: what an example is, how it is read and encoded, the head and its loss, answers and metrics.

    This class holds what suits texts and pairs of texts with a classification head; a kind overrides what differs. It
    has no state: one object serves all tasks of the kind. Modules of kinds import torch within functions only, so that
    tasks and results are read without it. docs/extending.md has an example.
    """

    name: str  # under `type` in a task's file
    fields: tuple[str, ...]  # what an example consists of; the files may call them otherwise (Task.fields)
    answer: str  # the key of an example that holds the right answer
    metrics: tuple[Metric, ...]  # the usual one first
    label_noun: str | None = None  # what a label is called; None where answers are no labels of a fixed set
    fewest_labels = 1
    always_pairs = False  # whether text_b must be there
    has_ner_head = False  # whether the protocol's ner_head concerns it
    auto_class = "AutoModelForSequenceClassification"  # of transformers
    problem_type: str | None = None  # of its configuration

    @property
    def metric_names(self) -> tuple[str, ...]:
        return tuple(metric.name for metric in self.metrics)

    @abstractmethod
    def read(self, record: Record) -> Example:
        """An example from a line of a file. Raises BadExample."""

    def labels_of(self, example: Example) -> set[str]:
        """The labels of an example, for kinds with labels of a fixed set."""
        return {example[self.answer]}

    def model_labels(self, labels: list[str]) -> tuple[str, ...]:
        """What a model chooses from, out of a task's sorted labels."""
        return tuple(labels)

    def gold(self, example: Example) -> Any:
        """The right answer in the form of a prediction."""
        return example[self.answer]

    def shuffle(self, examples: list[Example], rng: random.Random) -> list[Example]:
        """The same inputs with each other's answers: what is learned from them is chance."""
        answers = [example[self.answer] for example in examples]
        rng.shuffle(answers)
        return [example | {self.answer: answer} for example, answer in zip(examples, answers, strict=True)]

    def with_head(self, ner_head: str) -> TaskType:
        """The same kind with another head, where it has several."""
        return self

    def fit(self, train: Sequence[Example]) -> Any:
        """What encoding and decoding need of the training examples: Encoder.fitted."""
        return None

    def encode(self, examples: Sequence[Example], encoder: Encoder) -> list[Feature]:
        """A feature per example, with its `labels` in the form that the loss takes."""
        features = encoder.tokenize([e["text"] for e in examples], [e["text_b"] for e in examples])
        for feature, example in zip(features, examples, strict=True):
            feature["labels"] = self.target(example, encoder)
        return features

    def target(self, example: Example, encoder: Encoder) -> Any:
        """The right answer in the form that the loss takes."""
        return encoder.labels.index(example[self.answer])

    def collate(self, features: list[Feature], pad: int) -> dict[str, Tensor]:
        """A padded batch, the arguments of the model."""
        return pad_features(features, pad)

    def build_model(self, load: Callable[..., nn.Module], labels: tuple[str, ...]) -> nn.Module:
        """The network; `load(auto_class, **configuration)` opens the pretrained encoder with a new head."""
        options: dict[str, Any] = {}
        if labels:
            options = {"num_labels": len(labels), "id2label": dict(enumerate(labels))}
            options["label2id"] = {label: i for i, label in enumerate(labels)}
        if self.problem_type:  # given always, as a fine-tuned folder has that of another task
            options["problem_type"] = self.problem_type
        return load(self.auto_class, **options)

    def loss(self, labels: tuple[str, ...], train: list[Example]) -> Callable[..., Tensor] | None:
        """A loss of outputs with `logits` and of targets [batch, ...]; None for the model's own."""
        return None

    def kept_outputs(self, outputs: tuple[Tensor, ...]) -> Tensor:
        """What `decode` needs of a batch's outputs, logits first."""
        return outputs[0]

    @abstractmethod
    def decode(self, features: list[Feature], outputs: np.ndarray, encoder: Encoder) -> list[Any]:
        """Predictions out of the kept outputs of all examples, padded to the longest."""


class BadExample(ValueError):
    """A line that is no example of its task; the message says why."""


@dataclass
class Seen:
    """What the lines of a data set have shown so far, the training split's first."""

    pairs: bool | None  # whether texts come in pairs; None before the first line
    label_types: dict[str, type] = field(default_factory=dict)  # numbers or texts
    maybe_vectors: bool = True  # whether all lists of labels hold 0 and 1 alone
    list_lengths: set[int] = field(default_factory=set)


@dataclass
class Record:
    """A line of a task's file. Methods take a field by its usual name and raise BadExample for what does not fit."""

    values: dict[str, Any]
    keys: dict[str, str]  # the file's own, by usual names
    seen: Seen

    def key(self, name: str) -> str:
        return self.keys.get(name, name)

    def value(self, name: str) -> Any:
        key = self.key(name)
        if key not in self.values:
            raise BadExample(
                f"no key {key!r}{nearest(key, list(self.values))}; where the files call it otherwise, the task's YAML "
                f"file says so: fields: {{{name}: KEY}}"
            )
        return self.values[key]

    def text(self, name: str) -> str:
        return self.as_text(name, self.value(name))

    def as_text(self, name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise BadExample(f"the value of {self.key(name)!r} is {shown(value)}, not a text")
        if not value.strip():
            raise BadExample(f"the text under {self.key(name)!r} is blank")
        return value

    def texts(self) -> Example:
        """`text` and `text_b`, which is None where the training split has no pairs."""
        text, key = self.text("text"), self.key("text_b")
        has_second = self.values.get(key) is not None
        if self.seen.pairs is None:
            self.seen.pairs = has_second
        if has_second and not self.seen.pairs:
            raise BadExample(f"has a second text under {key!r}, which the first line of the training split lacks")
        return {"text": text, "text_b": self.text("text_b") if self.seen.pairs else None}

    def items(self, name: str) -> list[Any]:
        value = self.value(name)
        if not isinstance(value, list):
            raise BadExample(f"the value of {self.key(name)!r} is {shown(value)}, not a list")
        return value

    def number(self, name: str) -> float:
        value = self.value(name)
        try:
            if not isinstance(value, bool) and math.isfinite(value):
                return float(value)
        except (TypeError, OverflowError):
            pass
        raise BadExample(f"{shown(value)} under {self.key(name)!r}, where a number is needed")

    def as_name(self, name: str, value: Any) -> str:
        blank = isinstance(value, str) and not value.strip()
        if blank or isinstance(value, bool) or not isinstance(value, str | int):
            raise BadExample(f"{shown(value)} under {self.key(name)!r}, where a name or a whole number is needed")
        return str(value)

    def as_label(self, name: str, value: Any) -> str:
        """A label, which is a number everywhere or a text everywhere: 1 and "1" are not the same."""
        label = self.as_name(name, value)
        if self.seen.label_types.setdefault(label, type(value)) is not type(value):
            raise BadExample(f"the label {label!r} is a number in one line and a text in another; write it one way")
        return label

    def once(self, name: str, values: list[str]) -> list[str]:
        for i, value in enumerate(values):
            if value in values[:i]:
                raise BadExample(f"{value!r} stands twice under {self.key(name)!r}")
        return values

    def refuse_vectors(self, values: list[Any]) -> None:
        """Raises BadExample for what can only be a vector of 0 and 1, and notes what may be one."""
        ones = [value for value in values if isinstance(value, bool | int | float | str) and str(value) in ZEROS_ONES]
        if not values or len(ones) < len(values):
            self.seen.maybe_vectors = False
        elif any(isinstance(value, bool | float) for value in values) or len(set(map(str, values))) < len(values):
            raise BadExample(VECTOR)
        self.seen.list_lengths.add(len(values))


def shown(value: Any) -> str:
    """What a value is, without its content where that may be private."""
    if isinstance(value, str | list | dict):
        kind = {str: "a text", list: "a list", dict: "an object"}[type(value)]
        return kind if value else f"{kind} without anything in it"
    return json.dumps(value)[:20]
