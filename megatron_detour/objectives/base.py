"""The interface of objectives: a phase's settings in the run file, and everything that the package needs to know.

Code outside this package never compares names of objectives. docs/extending.md shows how to add one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

if TYPE_CHECKING:
    from megatron_detour.tokenizer.vocabulary import Vocabulary
    from megatron_detour.tokenizer.word_boundaries import Words

IGNORE = -100  # marks positions without a label, as in torch and transformers


@dataclass(frozen=True)
class Corrupted:
    """A model's inputs and labels; all int64."""

    inputs: np.ndarray  # [positions]
    labeled: np.ndarray  # [L], the labeled positions, ascending
    labels: np.ndarray  # [L]

    def all_labels(self) -> np.ndarray:
        """Return the labels of all positions, IGNORE where there is none, int64 [positions]."""
        labels = np.full(self.inputs.shape, IGNORE, dtype=np.int64)
        labels[self.labeled] = self.labels
        return labels


class Corruption:
    """An objective bound to a vocabulary.

    Results depend only on (seed, document, position): counter-based random numbers have no state, and a document's
    corruption does not depend on the rest of its batch.
    """

    causal: bool = False  # the direction of attention

    def apply(self, tokens: np.ndarray, lengths: np.ndarray, seed: int, numbers: np.ndarray) -> Corrupted:
        """Corrupt documents.

        tokens: int [positions], documents concatenated; lengths: int64 [documents], summing to `positions`;
        numbers: int64 [documents], the random streams of the documents.
        """
        raise NotImplementedError

    def groups(self, seed: int, numbers: np.ndarray) -> list[tuple[Corruption, np.ndarray]]:
        """Divide documents by direction of attention, as a micro-batch has one: the corruption that applies to each
        group, and the ascending indices of its documents. There is at least one group."""
        return [(self, np.arange(len(numbers)))]


@dataclass(frozen=True)
class Objective:
    """An objective; the fields of its dataclass are its keys in a phase.

    The defaults fit a bidirectional objective without keys that a run may end with.
    """

    name: ClassVar[str]  # in the run file, metrics and file names
    label: ClassVar[str]  # in tables, plots and pages
    color: ClassVar[tuple[str, str]]  # on light and dark pages, each with a contrast of at least 4.5
    detour: ClassVar[bool] = False  # whether --control replaces it, and ending a run with it gives a warning
    accuracy: ClassVar[bool] = False  # whether validation reports accuracy besides the loss
    special_tokens: ClassVar[tuple[str, ...]] = ()  # special tokens that the tokenizer must have, such as mask
    scheduled: ClassVar[tuple[str, ...]] = ()  # keys that may change from step to step, all of them fractions
    # Not annotated, as they are keys of some objectives.
    causal = False  # the direction of attention
    entities = None  # a file of words, whose occurrences `Words.entities` finds

    @classmethod
    def for_validation(cls, mask_rate: float) -> Self:
        """Return the objective for validation, at `validation.mask_rate`."""
        return cls()

    @classmethod
    def from_plan(cls, phase: dict[str, Any]) -> Self:
        """Read the keys of a phase of plan.json; a missing key becomes its default or None."""
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        keys = {key: phase.get(key, None if value is dataclasses.MISSING else value) for key, value in defaults.items()}
        return cls(**keys)

    def to_dict(self) -> dict[str, Any]:
        return {"objective": self.name, **dataclasses.asdict(self)}

    def bind(self, vocabulary: Vocabulary, words: Words | None = None) -> Corruption:
        """Return the corruption with these settings; `words` is set if `needs_word_boundaries`."""
        raise NotImplementedError

    def parts(self) -> list[tuple[float, Objective]]:
        """Return objectives of one direction of attention each, with the fraction of documents that each trains."""
        return [(1.0, self)]

    def at(self, done: int, tokens: int) -> Self:
        """Return the objective of the step that brings its phase to `done` of `tokens` tokens."""
        return self

    def labeled_share(self, mean_document: float, tokens: int) -> float:
        """Return the fraction of labeled positions over a phase of `tokens`; `mean_document`: tokens per document."""
        raise NotImplementedError

    def faults(self, tokens: int) -> Iterator[tuple[str, str]]:
        """Yield keys that contradict others or the length of the phase, and why."""
        return iter(())

    @property
    def needs_word_boundaries(self) -> bool:
        return False

    def details(self) -> str:
        """Return a summary of the keys for tables, such as ``30% masked``, or an empty string."""
        return ""

    def describe(self) -> str:
        return ", ".join(filter(None, [self.label, self.details()]))

    def figures(self) -> dict[str, float]:
        """Return the objective's metrics of a step."""
        return {key: getattr(self, key) for key in self.scheduled}

    def warnings(self) -> Iterator[tuple[str, str]]:
        """Yield keys with unusual values, and why."""
        return iter(())
