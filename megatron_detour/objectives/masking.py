"""Choice of the tokens to mask, and what replaces them.

A unit is what is chosen as a whole: a token, a word, a span of tokens or words, or an occurrence of a listed phrase.
The random number of a unit's first token decides, so that the expected fraction of masked tokens does not depend on
the length of units.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megatron_detour.counter_rng import GOLDEN, mix, streams
from megatron_detour.objectives.base import Corrupted, Corruption

if TYPE_CHECKING:
    from megatron_detour.tokenizer.entities import Entities
    from megatron_detour.tokenizer.vocabulary import Vocabulary
    from megatron_detour.tokenizer.word_boundaries import Words

KEEP, REPLACE_BY_MASK = 0.1, 0.8  # fractions of the chosen positions; the rest get random ids (Devlin et al., 2019)
CHOICE, ACTION, SPAN = 1, 2, 3  # random streams
FULL_CHOICE, FULL_ACTION = 1 << 16, 1 << 32
BLOCK = 1 << 16  # positions masked at once, so that intermediate arrays stay in the CPU cache
SPAN_END = 0.2  # the parameter of the geometric distribution of spans (SpanBERT, Joshi et al., 2020)


@dataclass(frozen=True)
class Masking(Corruption):
    """Masks a fraction of the ordinary tokens. Special tokens are never masked, nor used as random replacements.

    With `words`, whole words are masked; with `longest_span`, spans of tokens or of words. Occurrences of `entities`
    come first: as many as the mask rate allows in a document, and other units only for the rest.
    """

    vocabulary: Vocabulary
    mask_rate: float
    words: Words | None = None
    longest_span: int | None = None
    entities: Entities | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "_special", self.vocabulary.special())
        object.__setattr__(self, "_ordinary", self.vocabulary.ordinary())

    def apply(self, tokens: np.ndarray, lengths: np.ndarray, seed: int, numbers: np.ndarray) -> Corrupted:
        inputs = tokens.astype(np.int64)
        labeled, labels = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for documents, positions in _blocks(lengths):
            block_lengths, block_numbers = lengths[documents], numbers[documents]
            hit = self._choose(inputs[positions], seed, block_numbers, block_lengths)
            chosen, originals = self._replace(inputs[positions], hit, seed, block_numbers, block_lengths)
            labeled.append(chosen + positions.start)
            labels.append(originals)
        return Corrupted(inputs, np.concatenate(labeled), np.concatenate(labels))

    def _choose(self, tokens: np.ndarray, seed: int, numbers: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return the chosen positions, special tokens among them, as bool [positions]."""
        limits: int | np.ndarray = round(self.mask_rate * FULL_CHOICE)
        begins = None if self.words is None else self.words.first_tokens(tokens, lengths)
        if self.longest_span:
            begins = _span_begins(self.longest_span, seed, numbers, lengths, begins)
        if self.entities is not None:
            listed, is_begin = self.entities.find(tokens, lengths)
            is_begin[np.flatnonzero(~listed) if begins is None else begins[~listed[begins]]] = True
            begins, limits = np.flatnonzero(is_begin), self._limits(tokens, lengths, listed)
        hit = _draws(seed, CHOICE, numbers, lengths) < limits
        return hit if begins is None else np.repeat(hit[begins], np.diff(begins, append=len(hit)))

    def _limits(self, tokens: np.ndarray, lengths: np.ndarray, listed: np.ndarray) -> np.ndarray:
        """Return what draws must be below, int64 [positions]: high for `listed` tokens, so low for the others of their
        document that the mask rate is kept."""
        starts = np.cumsum(lengths) - lengths
        ordinary = np.add.reduceat(~self._special.take(tokens), starts, dtype=np.int64)
        first = np.add.reduceat(listed, starts, dtype=np.int64)
        masked = self.mask_rate * ordinary
        of_listed = np.minimum(masked / np.maximum(first, 1), 1)
        of_others = np.maximum(masked - first, 0) / np.maximum(ordinary - first, 1)
        limits = np.where(listed, *(np.repeat(share, lengths) for share in (of_listed, of_others)))
        return np.round(limits * FULL_CHOICE).astype(np.int64)

    def _replace(
        self, inputs: np.ndarray, hit: np.ndarray, seed: int, numbers: np.ndarray, lengths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Replace the ordinary tokens of `inputs` where `hit`, in place. Return their positions and original ids."""
        chosen = np.flatnonzero(hit)
        chosen = chosen[~self._special.take(inputs.take(chosen))]
        tokens = inputs.take(chosen)
        ends = np.cumsum(lengths)
        starts = streams(seed, ACTION, numbers) - (ends - lengths).astype(np.uint64) * np.uint64(GOLDEN)
        per_document = np.diff(chosen.searchsorted(ends), prepend=0)
        bits = mix(np.repeat(starts, per_document) + chosen.astype(np.uint64) * np.uint64(GOLDEN))
        action = bits & np.uint64(FULL_ACTION - 1)
        inputs[chosen] = self.vocabulary.mask
        unmasked = np.flatnonzero(action >= round(REPLACE_BY_MASK * FULL_ACTION))
        draws = bits[unmasked] >> np.uint64(32)
        random_ids = self._ordinary[(draws * np.uint64(len(self._ordinary))) >> np.uint64(32)]
        kept = action[unmasked] < round((REPLACE_BY_MASK + KEEP) * FULL_ACTION)
        inputs[chosen[unmasked]] = np.where(kept, tokens[unmasked], random_ids)
        return chosen, tokens


def _blocks(lengths: np.ndarray) -> Iterator[tuple[slice, slice]]:
    """Yield slices of documents that are masked together, and of their positions, about BLOCK each."""
    ends = np.cumsum(lengths)
    first = begin = 0
    while first < len(ends):
        last = max(int(ends.searchsorted(begin + BLOCK, side="right")), first + 1)
        end = int(ends[last - 1])
        yield slice(first, last), slice(begin, end)
        first, begin = last, end


def _span_begins(
    longest: int, seed: int, numbers: np.ndarray, lengths: np.ndarray, words: np.ndarray | None
) -> np.ndarray:
    """Divide documents into spans of random lengths, geometric up to `longest`. Return the first position of each.

    words: the first positions of words, of which spans then consist; else they consist of tokens.
    """
    at_most = 1 - (1 - SPAN_END) ** np.arange(1, longest + 1)
    shorter = np.round(at_most[:-1] / at_most[-1] * FULL_CHOICE).astype(np.int64)
    ends = np.cumsum(lengths)
    units = lengths if words is None else np.diff(words.searchsorted(ends), prepend=0)
    # A length for each unit: as many as there can be spans. Those that begin after their document are dropped.
    spans = shorter.searchsorted(_draws(seed, SPAN, numbers, units), side="right") + 1
    before, firsts = np.cumsum(spans) - spans, np.cumsum(units) - units
    inside = before - np.repeat(before[firsts], units)  # units of the document before each span
    begins = (inside + np.repeat(firsts, units))[inside < np.repeat(units, units)]
    return begins if words is None else words[begins]


def _draws(seed: int, purpose: int, numbers: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return a random number per position, uint16 [positions]: 64 bits serve four positions of a document."""
    fours = -(-lengths // 4)
    first = (np.cumsum(fours) - fours).astype(np.uint64)
    counters = np.arange(fours.sum(), dtype=np.uint64) * np.uint64(GOLDEN)
    counters += np.repeat(streams(seed, purpose, numbers) - first * np.uint64(GOLDEN), fours)
    drawn = mix(counters).astype("<u8", copy=False).view("<u2")
    ends = np.cumsum(4 * fours)
    used = np.ones(len(drawn), dtype=bool)
    for left in (1, 2, 3):  # unused numbers of documents whose length is not a multiple of four
        used[ends[4 * fours - lengths >= left] - left] = False
    return drawn[used]
