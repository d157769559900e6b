"""Causal language modeling: each token is predicted from those before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megatron_detour.objectives.base import Corrupted, Corruption, Objective

if TYPE_CHECKING:
    from megatron_detour.tokenizer.vocabulary import Vocabulary
    from megatron_detour.tokenizer.word_boundaries import Words


@dataclass(frozen=True)
class CausalLM(Objective):
    name = "clm"
    label = "CLM"
    color = ("#b04a08", "#ff9d5c")
    causal = True
    detour = True

    def bind(self, vocabulary: Vocabulary, words: Words | None = None) -> NextToken:
        return NextToken(vocabulary)

    def labeled_share(self, mean_document: float, tokens: int) -> float:
        return 1 - 1 / mean_document


@dataclass(frozen=True)
class NextToken(Corruption):
    """A position's label is its document's next token; the last position has none. [CLS] is never a target."""

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
        labeled = np.flatnonzero(has_label)
        return Corrupted(inputs, labeled, following[labeled])
