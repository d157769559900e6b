"""An objective is one object: the direction of attention, the corruption of the input and the labels.

A third objective is one more small class here and a name in `make`. Corruption depends on (seed, document, position)
alone: counter-based random numbers leave no state behind, and a document's do not depend on its neighbours in a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_detour.counter_rng import GOLDEN, mix, streams
from megatron_detour.tokenizer.vocabulary import Vocabulary
from megatron_detour.tokenizer.word_boundaries import Words

IGNORE = -100  # the label of a position that has none, as in torch and transformers
KEEP, REPLACE_BY_MASK = 0.1, 0.8  # of the chosen positions; the rest gets a random id (Devlin et al., 2019)
CHOICE, ACTION = 1, 2  # what draws are for
FULL_CHOICE, FULL_ACTION = 1 << 16, 1 << 32
BLOCK = 1 << 16  # positions masked at once: what is needed in between stays in the cache


@dataclass(frozen=True)
class Corrupted:
    """What a model is given and asked for; all int64."""

    inputs: np.ndarray  # [positions]
    labelled: np.ndarray  # [L], the labelled positions, ascending
    labels: np.ndarray  # [L]

    def all_labels(self) -> np.ndarray:
        """[positions], IGNORE where there is none."""
        labels = np.full(self.inputs.shape, IGNORE, dtype=np.int64)
        labels[self.labelled] = self.labels
        return labels


class Objective(Protocol):
    causal: bool

    def apply(self, tokens: np.ndarray, lengths: np.ndarray, seed: int, numbers: np.ndarray) -> Corrupted:
        """Corrupts documents.

        tokens: int [positions], one document after the other; lengths: int64 [documents], summing to `positions`;
        numbers: int64 [documents], by which the documents draw.
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
        labelled, labels = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for documents, positions in _blocks(lengths):
            some, draws = lengths[documents], numbers[documents]
            hit = _choices(seed, draws, some) < round(self.mask_rate * FULL_CHOICE)
            if self.words is not None:
                begins = self.words.first_tokens(inputs[positions], some)
                hit = np.repeat(hit[begins], np.diff(begins, append=len(hit)))  # as a word's first token drew
            chosen, were = self._replace(inputs[positions], hit, seed, draws, some)
            labelled.append(chosen + positions.start)
            labels.append(were)
        return Corrupted(inputs, np.concatenate(labelled), np.concatenate(labels))

    def _replace(
        self, inputs: np.ndarray, hit: np.ndarray, seed: int, numbers: np.ndarray, lengths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Replaces tokens of `inputs` where `hit`, but for special ones; returns where, and which they were."""
        chosen = np.flatnonzero(hit)
        chosen = chosen[~self._special.take(inputs.take(chosen))]
        tokens = inputs.take(chosen)
        ends = np.cumsum(lengths)
        starts = streams(seed, ACTION, numbers) - (ends - lengths).astype(np.uint64) * np.uint64(GOLDEN)
        per_document = np.diff(chosen.searchsorted(ends), prepend=0)
        bits = mix(np.repeat(starts, per_document) + chosen.astype(np.uint64) * np.uint64(GOLDEN))
        action = bits & np.uint64(FULL_ACTION - 1)
        inputs[chosen] = self.vocabulary.mask
        others = np.flatnonzero(action >= round(REPLACE_BY_MASK * FULL_ACTION))
        random_ids = self._ordinary[((bits[others] >> np.uint64(32)) * np.uint64(len(self._ordinary))) >> np.uint64(32)]
        kept = action[others] < round((REPLACE_BY_MASK + KEEP) * FULL_ACTION)
        inputs[chosen[others]] = np.where(kept, tokens[others], random_ids)
        return chosen, tokens


@dataclass(frozen=True)
class CausalLM:
    """Causal; a position's label is the next token of its document, and the last one has none. [CLS] is never a
    target."""

    vocabulary: Vocabulary
    causal = True

    def apply(self, tokens: np.ndarray, lengths: np.ndarray, seed: int, numbers: np.ndarray) -> Corrupted:
        inputs = tokens.astype(np.int64)
        following = np.roll(inputs, -1)
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


def _blocks(lengths: np.ndarray) -> Iterator[tuple[slice, slice]]:
    """Documents that are masked together, and their positions: about BLOCK of these."""
    ends = np.cumsum(lengths)
    first = begin = 0
    while first < len(ends):
        last = max(int(ends.searchsorted(begin + BLOCK, side="right")), first + 1)
        end = int(ends[last - 1])
        yield slice(first, last), slice(begin, end)
        first, begin = last, end


def _choices(seed: int, numbers: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """A draw for each position, uint16 [positions]: 64 bits serve four of a document's."""
    fours = -(-lengths // 4)
    first = (np.cumsum(fours) - fours).astype(np.uint64)
    counters = np.arange(fours.sum(), dtype=np.uint64) * np.uint64(GOLDEN)
    counters += np.repeat(streams(seed, CHOICE, numbers) - first * np.uint64(GOLDEN), fours)
    drawn = mix(counters).astype("<u8", copy=False).view("<u2")
    ends = np.cumsum(4 * fours)
    used = np.ones(len(drawn), dtype=bool)
    for left in (1, 2, 3):  # by a document whose length is no multiple of four
        used[ends[4 * fours - lengths >= left] - left] = False
    return drawn[used]
