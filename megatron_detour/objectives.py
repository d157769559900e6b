"""An objective is one object: the direction of attention, the corruption of the input and the labels.

A third objective is one more small class here and a name in `make`. Corruption depends on (seed, sample) alone:
counter-based random numbers leave no state behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_detour.data.vocabulary import Vocabulary

IGNORE = -100  # the label of a position that has none, as in torch and transformers
KEEP, REPLACE_BY_MASK = 0.1, 0.8  # of the chosen positions; the rest gets a random id (Devlin et al., 2019)
FULL = 1 << 32


class Objective(Protocol):
    causal: bool

    def apply(self, tokens: np.ndarray, lengths: np.ndarray, seed: int, sample: int) -> tuple[np.ndarray, np.ndarray]:
        """Makes (inputs, labels), both int64 [positions], of a pack.

        tokens: int64 [positions], documents one after the other; lengths: int64 [documents], summing to `positions`.
        """
        ...


@dataclass(frozen=True)
class MaskedLM:
    """Bidirectional; a share of the ordinary tokens is to be restored. Special tokens are never chosen or drawn."""

    vocabulary: Vocabulary
    mask_rate: float
    causal = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "_special", self.vocabulary.special())
        object.__setattr__(self, "_ordinary", self.vocabulary.ordinary())

    def apply(self, tokens: np.ndarray, lengths: np.ndarray, seed: int, sample: int) -> tuple[np.ndarray, np.ndarray]:
        bits = np.random.Philox(key=(seed, sample)).random_raw(2 * len(tokens)).reshape(2, -1)
        high, low = bits >> np.uint64(32), bits & np.uint64(FULL - 1)
        chosen = (high[0] < round(self.mask_rate * FULL)) & ~self._special[tokens]
        action = low[0]
        random_ids = self._ordinary[(high[1] * np.uint64(len(self._ordinary))) >> np.uint64(32)]
        inputs = np.where(chosen & (action < round(REPLACE_BY_MASK * FULL)), self.vocabulary.mask, tokens)
        inputs = np.where(chosen & (action >= round((REPLACE_BY_MASK + KEEP) * FULL)), random_ids, inputs)
        return inputs, np.where(chosen, tokens, IGNORE)


@dataclass(frozen=True)
class CausalLM:
    """Causal; a position's label is the next token of its document, and the last one has none. [CLS] is never a
    target, nor is padding, which is a document of its own."""

    vocabulary: Vocabulary
    causal = True

    def apply(self, tokens: np.ndarray, lengths: np.ndarray, seed: int, sample: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.roll(tokens, -1)
        labels[np.cumsum(lengths) - 1] = IGNORE
        labels[(labels == self.vocabulary.pad) | (labels == self.vocabulary.cls)] = IGNORE
        return tokens, labels


def make(name: str, mask_rate: float | None, vocabulary: Vocabulary) -> Objective:
    """The objective that a phase of the run file names."""
    return CausalLM(vocabulary) if name == "clm" else MaskedLM(vocabulary, mask_rate)
