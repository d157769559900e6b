"""An objective is one object: the direction of attention, the corruption of the input and the labels.

A third objective is one more small class here and a name in `make`. Corruption depends on (seed, sample, position)
alone: counter-based random numbers leave no state behind, and a sample's do not depend on its neighbours in a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_detour.data.splitmix import GOLDEN, mix, streams
from megatron_detour.data.vocabulary import Vocabulary
from megatron_detour.data.words import Words

IGNORE = -100  # the label of a position that has none, as in torch and transformers
KEEP, REPLACE_BY_MASK = 0.1, 0.8  # of the chosen positions; the rest gets a random id (Devlin et al., 2019)
CHOICE, ACTION = 1, 2  # what draws are for
FULL_CHOICE, FULL_ACTION = 1 << 16, 1 << 32
BLOCK = 1 << 16  # positions masked at once: what is needed in between stays in the cache


@dataclass(frozen=True)
class Corrupted:
    """What a model is given and asked for; all int64."""

    inputs: np.ndarray  # [samples, positions]
    labelled: np.ndarray  # [L], the labelled positions, ascending, counted through all samples
    labels: np.ndarray  # [L]

    def all_labels(self) -> np.ndarray:
        """[samples, positions], IGNORE where there is none."""
        labels = np.full(self.inputs.shape, IGNORE, dtype=np.int64)
        labels.reshape(-1)[self.labelled] = self.labels
        return labels


class Objective(Protocol):
    causal: bool

    def apply(self, tokens: np.ndarray, lengths: np.ndarray, seed: int, numbers: np.ndarray) -> Corrupted:
        """Corrupts packs.

        tokens: int [samples, positions], documents one after the other; lengths: int64 [documents] of all samples,
        those of a sample summing to `positions`; numbers: int64 [samples], by which the samples draw.
        """
        ...


@dataclass(frozen=True)
class MaskedLM:
    """Bidirectional; a share of the ordinary tokens is to be restored. Special tokens are never chosen or drawn.

    With `words`, all tokens of a word are chosen or none, at the same expected share.
    """

    vocabulary: Vocabulary
    mask_rate: float
    words: Words | None = None
    causal = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "_special", self.vocabulary.special())
        object.__setattr__(self, "_ordinary", self.vocabulary.ordinary())

    def apply(self, tokens: np.ndarray, lengths: np.ndarray, seed: int, numbers: np.ndarray) -> Corrupted:
        inputs = tokens.astype(np.int64)
        samples, positions = tokens.shape
        together, ends, parts = max(BLOCK // positions, 1), np.cumsum(lengths), []
        for first in range(0, samples, together):
            last = min(first + together, samples)
            hit = _choices(seed, numbers[first:last], positions) < round(self.mask_rate * FULL_CHOICE)
            if self.words is not None:
                documents = slice(*ends.searchsorted([first * positions, last * positions], side="right"))
                begins = self.words.first_tokens(inputs[first:last].reshape(-1), lengths[documents])
                hit = _as_first_token(hit, begins)
            chosen, were = self._replace(inputs[first:last], hit, seed, numbers[first:last])
            parts.append((chosen + first * positions, were))
        labelled, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return Corrupted(inputs, labelled, labels)

    def _replace(
        self, inputs: np.ndarray, hit: np.ndarray, seed: int, numbers: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Replaces tokens of `inputs` where `hit`, but for special ones; returns where, counted through, and which."""
        flat, positions = inputs.reshape(-1), inputs.shape[1]
        chosen = np.flatnonzero(hit)
        chosen = chosen[~self._special.take(flat.take(chosen))]
        tokens = flat.take(chosen)
        sample, position = np.divmod(chosen, positions)
        bits = _draws(streams(seed, ACTION, numbers).take(sample), position)
        action = bits & np.uint64(FULL_ACTION - 1)
        flat[chosen] = self.vocabulary.mask
        others = np.flatnonzero(action >= round(REPLACE_BY_MASK * FULL_ACTION))
        random_ids = self._ordinary[((bits[others] >> np.uint64(32)) * np.uint64(len(self._ordinary))) >> np.uint64(32)]
        kept = action[others] < round((REPLACE_BY_MASK + KEEP) * FULL_ACTION)
        flat[chosen[others]] = np.where(kept, tokens[others], random_ids)
        return chosen, tokens


@dataclass(frozen=True)
class CausalLM:
    """Causal; a position's label is the next token of its document, and the last one has none. [CLS] is never a
    target, nor is padding, which is a document of its own."""

    vocabulary: Vocabulary
    causal = True

    def apply(self, tokens: np.ndarray, lengths: np.ndarray, seed: int, numbers: np.ndarray) -> Corrupted:
        inputs = tokens.astype(np.int64)
        following = np.roll(inputs.reshape(-1), -1)
        has_label = np.ones(len(following), dtype=bool)
        has_label[np.cumsum(lengths) - 1] = False
        for special in (self.vocabulary.pad, self.vocabulary.cls):
            if special is not None:
                has_label &= following != special
        labelled = np.flatnonzero(has_label)
        return Corrupted(inputs, labelled, following[labelled])


def make(name: str, mask_rate: float | None, vocabulary: Vocabulary, words: Words | None = None) -> Objective:
    """The objective that a phase of the run file names."""
    return CausalLM(vocabulary) if name == "clm" else MaskedLM(vocabulary, mask_rate, words)


def _as_first_token(hit: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Of bool [samples, positions]: what a word's first token drew, for all of its tokens, bool [positions]."""
    return np.repeat(hit.reshape(-1)[first], np.diff(first, append=hit.size))


def _choices(seed: int, numbers: np.ndarray, positions: int) -> np.ndarray:
    """Draws for all positions, uint16 [samples, positions]: 64 bits serve four of them."""
    words = _draws(streams(seed, CHOICE, numbers)[:, None], np.arange(-(-positions // 4)))
    return words.astype("<u8", copy=False).view("<u2")[:, :positions]


def _draws(stream: np.ndarray, counter: np.ndarray) -> np.ndarray:
    """uint64 draws number `counter`, int64, of these streams, uint64."""
    return mix(stream + counter.astype(np.uint64) * np.uint64(GOLDEN))
