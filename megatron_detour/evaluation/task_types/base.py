"""TaskType, the base class of all task types, and Record, which reads a line of a task's file."""

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
VECTOR = "labels look like a vector of 0 and 1; list the names of the labels that apply"


class TaskType(ABC):
    """A task type: its examples, how they are read and encoded, head and loss, decoding and metrics.

    The defaults suit texts and pairs of texts with a classification head; subclasses override what differs. A task type
    has no state: one object serves all its tasks. Its module imports torch only inside functions, so that tasks and
    results can be read without it. docs/extending.md has an example.
    """

    name: str  # `type` in a task's file
    fields: tuple[str, ...]  # of an example; Task.fields maps them to the files' keys
    answer: str  # the field with the gold answer
    metrics: tuple[Metric, ...]  # the default first
    label_noun: str | None = None  # how messages call a label; None without a fixed label set
    fewest_labels = 1
    always_pairs = False  # whether text_b is required
    has_ner_head = False  # whether the protocol's ner_head applies
    auto_class = "AutoModelForSequenceClassification"  # in transformers
    problem_type: str | None = None  # in its configuration

    @property
    def metric_names(self) -> tuple[str, ...]:
        return tuple(metric.name for metric in self.metrics)

    @abstractmethod
    def read(self, record: Record) -> Example:
        """Convert a line of a file to an example. Raises BadExample."""

    def labels_of(self, example: Example) -> set[str]:
        """Return the labels of an example, for types with a fixed label set."""
        return {example[self.answer]}

    def model_labels(self, labels: list[str]) -> tuple[str, ...]:
        """Return the model's output labels for a task's sorted labels."""
        return tuple(labels)

    def gold(self, example: Example) -> Any:
        """Return the gold answer in the form of a prediction."""
        return example[self.answer]

    def shuffle(self, examples: list[Example], rng: random.Random) -> list[Example]:
        """Return the same inputs with shuffled answers."""
        answers = [example[self.answer] for example in examples]
        rng.shuffle(answers)
        return [example | {self.answer: answer} for example, answer in zip(examples, answers, strict=True)]

    def with_head(self, ner_head: str) -> TaskType:
        """Return the task type with another head, if it has several."""
        return self

    def fit(self, train: Sequence[Example]) -> Any:
        """Return what encoding and decoding need to know about the training examples (Encoder.fitted)."""
        return None

    def encode(self, examples: Sequence[Example], encoder: Encoder) -> list[Feature]:
        """Return a feature per example, with `labels` in the form that the loss expects."""
        features = encoder.tokenize([e["text"] for e in examples], [e["text_b"] for e in examples])
        for feature, example in zip(features, examples, strict=True):
            feature["labels"] = self.target(example, encoder)
        return features

    def target(self, example: Example, encoder: Encoder) -> Any:
        """Return the gold answer in the form that the loss expects."""
        return encoder.labels.index(example[self.answer])

    def collate(self, features: list[Feature], pad: int) -> dict[str, Tensor]:
        """Return a padded batch: the model's arguments."""
        return pad_features(features, pad)

    def build_model(self, load: Callable[..., nn.Module], labels: tuple[str, ...]) -> nn.Module:
        """Build the network; `load(auto_class, **configuration)` loads the pretrained encoder with a new head."""
        options: dict[str, Any] = {}
        if labels:
            options = {"num_labels": len(labels), "id2label": dict(enumerate(labels))}
            options["label2id"] = {label: i for i, label in enumerate(labels)}
        if self.problem_type:  # always set: a fine-tuned folder may have another task's
            options["problem_type"] = self.problem_type
        return load(self.auto_class, **options)

    def loss(self, labels: tuple[str, ...], train: list[Example]) -> Callable[..., Tensor] | None:
        """Return a loss of outputs with `logits` and targets [batch, ...]; None for the model's built-in loss."""
        return None

    def kept_outputs(self, outputs: tuple[Tensor, ...]) -> Tensor:
        """Select what `decode` needs from a batch's outputs, logits first."""
        return outputs[0]

    @abstractmethod
    def decode(self, features: list[Feature], outputs: np.ndarray, encoder: Encoder) -> list[Any]:
        """Convert the kept outputs of all examples, padded to the longest, to predictions."""


class BadExample(ValueError):
    """A line that is not a valid example; the message says why."""


@dataclass
class Seen:
    """What the lines read so far have in common, starting with the training split."""

    pairs: bool | None  # whether texts come in pairs; None before the first line
    label_types: dict[str, type] = field(default_factory=dict)  # int or str
    maybe_vectors: bool = True  # whether all label lists contain only 0 and 1
    list_lengths: set[int] = field(default_factory=set)


@dataclass
class Record:
    """A line of a task's file. Methods read a field by its default name and raise BadExample if it is invalid."""

    values: dict[str, Any]
    keys: dict[str, str]  # the file's keys by field name
    seen: Seen

    def key(self, name: str) -> str:
        return self.keys.get(name, name)

    def value(self, name: str) -> Any:
        key = self.key(name)
        if key not in self.values:
            raise BadExample(
                f"no key {key!r}{nearest(key, list(self.values))}; if the files use another key, set "
                f"fields: {{{name}: KEY}} in the task's YAML file"
            )
        return self.values[key]

    def text(self, name: str) -> str:
        return self.as_text(name, self.value(name))

    def as_text(self, name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise BadExample(f"{self.key(name)!r} is {shown(value)}, not a string")
        if not value.strip():
            raise BadExample(f"{self.key(name)!r} is blank")
        return value

    def texts(self) -> Example:
        """Return `text` and `text_b`, which is None if the training split has no pairs."""
        text, key = self.text("text"), self.key("text_b")
        has_second = self.values.get(key) is not None
        if self.seen.pairs is None:
            self.seen.pairs = has_second
        if has_second and not self.seen.pairs:
            raise BadExample(f"has a second text {key!r}, but the first line of the training split has none")
        return {"text": text, "text_b": self.text("text_b") if self.seen.pairs else None}

    def items(self, name: str) -> list[Any]:
        value = self.value(name)
        if not isinstance(value, list):
            raise BadExample(f"{self.key(name)!r} is {shown(value)}, not a list")
        return value

    def number(self, name: str) -> float:
        value = self.value(name)
        try:
            if not isinstance(value, bool) and math.isfinite(value):
                return float(value)
        except (TypeError, OverflowError):
            pass
        raise BadExample(f"{self.key(name)!r} is {shown(value)}, not a number")

    def as_name(self, name: str, value: Any) -> str:
        blank = isinstance(value, str) and not value.strip()
        if blank or isinstance(value, bool) or not isinstance(value, str | int):
            raise BadExample(f"{self.key(name)!r} is {shown(value)}, not a name or an integer")
        return str(value)

    def as_label(self, name: str, value: Any) -> str:
        """Convert a label, which must be a number in all lines or a string in all lines: 1 and "1" differ."""
        label = self.as_name(name, value)
        if self.seen.label_types.setdefault(label, type(value)) is not type(value):
            raise BadExample(f"the label {label!r} is a number in one line and a string in another; use one of them")
        return label

    def once(self, name: str, values: list[str]) -> list[str]:
        for i, value in enumerate(values):
            if value in values[:i]:
                raise BadExample(f"duplicate {value!r} in {self.key(name)!r}")
        return values

    def refuse_vectors(self, values: list[Any]) -> None:
        """Raise BadExample for a vector of 0 and 1, and record lists that may be one."""
        ones = [value for value in values if isinstance(value, bool | int | float | str) and str(value) in ZEROS_ONES]
        if not values or len(ones) < len(values):
            self.seen.maybe_vectors = False
        elif any(isinstance(value, bool | float) for value in values) or len(set(map(str, values))) < len(values):
            raise BadExample(VECTOR)
        self.seen.list_lengths.add(len(values))


def shown(value: Any) -> str:
    """Describe a value without content that may be private."""
    if isinstance(value, str | list | dict):
        kind = {str: "string", list: "list", dict: "object"}[type(value)]
        return f"{'an empty' if not value else 'an' if kind == 'object' else 'a'} {kind}"
    return json.dumps(value)[:20]
