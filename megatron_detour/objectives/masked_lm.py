"""Masked language modeling: a fraction of the tokens is predicted from the rest of the document."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Self

import numpy as np

from megatron_detour.counter_rng import GOLDEN, mix, streams
from megatron_detour.objectives.base import Corrupted, Objective
from megatron_detour.settings import Range

if TYPE_CHECKING:
    from megatron_detour.tokenizer.vocabulary import Vocabulary
    from megatron_detour.tokenizer.word_boundaries import Words

KEEP, REPLACE_BY_MASK = 0.1, 0.8  # fractions of the chosen positions; the rest get random ids (Devlin et al., 2019)
CHOICE, ACTION = 1, 2  # random streams
FULL_CHOICE, FULL_ACTION = 1 << 16, 1 << 32
BLOCK = 1 << 16  # positions masked at once, so that intermediate arrays stay in the CPU cache
SHARE, USUAL_RATES = Range(above=0, below=1), (0.05, 0.50)


@dataclass(frozen=True)
class MaskedLM(Objective):
    name = "mlm"
    label = "MLM"
    color = ("#2563c9", "#7fb0ff")
    accuracy = True
    special_tokens = ("mask",)
    scheduled = ("mask_rate",)

    mask_rate: Annotated[float, SHARE, "fraction of tokens that is masked"]
    mask_rate_end: Annotated[
        float | None, SHARE, "mask rate at the end of the phase, reached linearly; by default constant"
    ] = None
    whole_word_masking: Annotated[bool, "mask whole words (section 4)"] = False

    @classmethod
    def for_validation(cls, mask_rate: float) -> Self:
        return cls(mask_rate)

    def bind(self, vocabulary: Vocabulary, words: Words | None = None) -> Masking:
        return Masking(vocabulary, self.mask_rate, words if self.whole_word_masking else None)

    def at(self, done: int, tokens: int) -> Self:
        first, last = self.mask_rate, self.mask_rate_end
        if last is None:
            return self
        return dataclasses.replace(self, mask_rate=first + (last - first) * done / tokens, mask_rate_end=None)

    def labeled_share(self, mean_document: float) -> float:
        first, last = self.mask_rate, self.mask_rate_end
        return first if last is None else (first + last) / 2

    @property
    def needs_word_boundaries(self) -> bool:
        return self.whole_word_masking

    def details(self) -> str:
        first, last = self.mask_rate, self.mask_rate_end
        if first is None:
            return ""
        end = "" if last in (None, first) else f" to {100 * last:.3g}%"
        return f"{100 * first:.3g}%{end} masked{', whole words' if self.whole_word_masking else ''}"

    def warnings(self) -> Iterator[tuple[str, str]]:
        low, high = USUAL_RATES
        for key in ("mask_rate", "mask_rate_end"):
            rate = getattr(self, key)
            if rate is not None and not low <= rate <= high:
                yield key, f"{rate:g} is outside {low:g} to {high:g}; 0.15 to 0.3 is usual"


@dataclass(frozen=True)
class Masking:
    """Masks a fraction of the ordinary tokens. Special tokens are never masked, nor used as random replacements.

    With `words`, whole words are masked, at the same expected fraction of tokens.
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
        labeled, labels = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for documents, positions in _blocks(lengths):
            block_lengths, block_numbers = lengths[documents], numbers[documents]
            hit = _choices(seed, block_numbers, block_lengths) < round(self.mask_rate * FULL_CHOICE)
            if self.words is not None:
                begins = self.words.first_tokens(inputs[positions], block_lengths)
                hit = np.repeat(hit[begins], np.diff(begins, append=len(hit)))  # a word's first token decides
            chosen, originals = self._replace(inputs[positions], hit, seed, block_numbers, block_lengths)
            labeled.append(chosen + positions.start)
            labels.append(originals)
        return Corrupted(inputs, np.concatenate(labeled), np.concatenate(labels))

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


def _choices(seed: int, numbers: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return a random number per position, uint16 [positions]: 64 bits serve four positions of a document."""
    fours = -(-lengths // 4)
    first = (np.cumsum(fours) - fours).astype(np.uint64)
    counters = np.arange(fours.sum(), dtype=np.uint64) * np.uint64(GOLDEN)
    counters += np.repeat(streams(seed, CHOICE, numbers) - first * np.uint64(GOLDEN), fours)
    drawn = mix(counters).astype("<u8", copy=False).view("<u2")
    ends = np.cumsum(4 * fours)
    used = np.ones(len(drawn), dtype=bool)
    for left in (1, 2, 3):  # unused numbers of documents whose length is not a multiple of four
        used[ends[4 * fours - lengths >= left] - left] = False
    return drawn[used]
