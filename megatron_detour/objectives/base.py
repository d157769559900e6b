"""What every objective is: the settings of a phase in the run file, and all that the rest of the package asks of it.

Runs name objectives by `name`; nothing outside this package compares names. docs/extending.md adds one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import numpy as np

if TYPE_CHECKING:
    from megatron_detour.tokenizer.vocabulary import Vocabulary
    from megatron_detour.tokenizer.word_boundaries import Words

IGNORE = -100  # the label of a position that has none, as in torch and transformers


@dataclass(frozen=True)
class Corrupted:
    """The inputs of a model and its labels; all int64."""

    inputs: np.ndarray  # [positions]
    labelled: np.ndarray  # [L], the labelled positions, ascending
    labels: np.ndarray  # [L]

    def all_labels(self) -> np.ndarray:
        """[positions], IGNORE where there is none."""
        labels = np.full(self.inputs.shape, IGNORE, dtype=np.int64)
        labels[self.labelled] = self.labels
        return labels


class Corruption(Protocol):
    """An objective at work with a vocabulary.

    It depends on (seed, document, position) alone: counter-based random numbers leave no state behind, and a
    document's do not depend on its neighbors in a batch.
    """

    causal: bool  # the direction of attention

    def apply(self, tokens: np.ndarray, lengths: np.ndarray, seed: int, numbers: np.ndarray) -> Corrupted:
        """Corrupts documents.

        tokens: int [positions], one document after the other; lengths: int64 [documents], summing to `positions`;
        numbers: int64 [documents], by which the documents draw.
        """
        ...


@dataclass(frozen=True)
class Objective:
    """An objective with the keys that a phase gives it: the fields of its dataclass.

    The defaults suit a bidirectional objective without keys that ends where a run may end.
    """

    name: ClassVar[str]  # in the run file, in records and file names
    label: ClassVar[str]  # in tables, plots and pages
    color: ClassVar[tuple[str, str]]  # on light and on dark pages, with a contrast of 4.5 or more to both
    causal: ClassVar[bool] = False  # the direction of attention
    detour: ClassVar[bool] = False  # whether --control replaces it, and a run that ends with it is warned of
    accuracy: ClassVar[bool] = False  # whether validation counts right answers besides the loss
    special_tokens: ClassVar[tuple[str, ...]] = ()  # roles that the tokenizer must have, such as mask
    scheduled: ClassVar[tuple[str, ...]] = ()  # keys that may change from step to step, all of them shares

    @classmethod
    def for_validation(cls, mask_rate: float) -> Self:
        """As held-out text is measured, at `validation.mask_rate`."""
        return cls()

    @classmethod
    def of(cls, phase: dict[str, Any]) -> Self:
        """With the keys of a phase of plan.json; a key that is missing becomes its default or None."""
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        keys = {key: phase.get(key, None if value is dataclasses.MISSING else value) for key, value in defaults.items()}
        return cls(**keys)

    def to_dict(self) -> dict[str, Any]:
        return {"objective": self.name, **dataclasses.asdict(self)}

    def bind(self, vocabulary: Vocabulary, words: Words | None = None) -> Corruption:
        """The corruption of the objective's first step; `words` where it asks for word boundaries."""
        raise NotImplementedError

    def at(self, done: int, tokens: int) -> Self:
        """The objective of the step that brings its phase to `done` of its `tokens`."""
        return self

    def labeled_share(self, mean_document: float) -> float:
        """The share of positions with a label, of documents of this many tokens on average, over the whole phase."""
        raise NotImplementedError

    @property
    def needs_word_boundaries(self) -> bool:
        return False

    def details(self) -> str:
        """What its keys say, for tables: such as ``30% masked``; nothing where they have nothing to say."""
        return ""

    def describe(self) -> str:
        return ", ".join(filter(None, [self.label, self.details()]))

    def figures(self) -> dict[str, float]:
        """What a step's record says of it."""
        return {key: getattr(self, key) for key in self.scheduled}

    def warnings(self) -> Iterator[tuple[str, str]]:
        """Keys with values that are seldom meant, and why."""
        return iter(())
