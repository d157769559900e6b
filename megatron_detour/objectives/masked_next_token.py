"""Masked next-token prediction (BehnamGhader et al., 2024): a masked token is predicted at the position before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np

from megatron_detour.objectives.base import Corrupted, Corruption
from megatron_detour.objectives.masked_lm import MaskedLM

if TYPE_CHECKING:
    from megatron_detour.tokenizer.vocabulary import Vocabulary
    from megatron_detour.tokenizer.word_boundaries import Words


@dataclass(frozen=True)
class MaskedNextToken(MaskedLM):
    name = "mntp"
    label = "MNTP"
    color = ("#7a3fb0", "#c79af5")
    detour = True

    causal: Annotated[bool, "causal attention, so that masked tokens are predicted from those before them only"] = False

    def bind(self, vocabulary: Vocabulary, words: Words | None = None) -> PositionBefore:
        return PositionBefore(super().bind(vocabulary, words), self.causal)

    def labeled_share(self, mean_document: float, tokens: int) -> float:
        return super().labeled_share(mean_document, tokens) * (1 - 1 / mean_document)

    def details(self) -> str:
        return ", ".join(filter(None, [super().details(), "causal" if self.causal else ""]))


@dataclass(frozen=True)
class PositionBefore(Corruption):
    """The labels of `masking`, one position earlier; a document's first token is masked, but never a label."""

    masking: Corruption
    causal: bool

    def apply(self, tokens: np.ndarray, lengths: np.ndarray, seed: int, numbers: np.ndarray) -> Corrupted:
        masked = self.masking.apply(tokens, lengths, seed, numbers)
        kept = ~np.isin(masked.labeled, np.cumsum(lengths) - lengths)
        return Corrupted(masked.inputs, masked.labeled[kept] - 1, masked.labels[kept])
