"""Causal and masked documents in every step (GPT-BERT, Charpentier and Samuel, 2024). Both predict the next token."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np

from megatron_detour.counter_rng import mix, streams
from megatron_detour.objectives.base import Corruption, Objective
from megatron_detour.objectives.causal_lm import CausalLM
from megatron_detour.objectives.masked_lm import SHARE, MaskedLM
from megatron_detour.objectives.masked_next_token import MaskedNextToken

if TYPE_CHECKING:
    from megatron_detour.tokenizer.vocabulary import Vocabulary
    from megatron_detour.tokenizer.word_boundaries import Words

DIRECTION = 4  # a random stream


@dataclass(frozen=True)
class Hybrid(MaskedLM):
    name = "hybrid"
    label = "Hybrid"
    color = ("#0b6e6e", "#5fd0cf")
    detour = True
    accuracy = False  # of next tokens and of masked ones together it would say little

    causal_share: Annotated[
        float, SHARE, "fraction of the documents that is trained as in clm; the others are trained as in mntp"
    ] = 0.5

    def parts(self) -> list[tuple[float, Objective]]:
        masking = {field.name: getattr(self, field.name) for field in dataclasses.fields(MaskedLM)}
        return [(self.causal_share, CausalLM()), (1 - self.causal_share, MaskedNextToken(**masking))]

    def bind(self, vocabulary: Vocabulary, words: Words | None = None) -> CausalOrMasked:
        return CausalOrMasked(self.causal_share, *(part.bind(vocabulary, words) for _, part in self.parts()))

    def labeled_share(self, mean_document: float, tokens: int) -> float:
        return sum(share * part.labeled_share(mean_document, tokens) for share, part in self.parts())

    def details(self) -> str:
        causal = "" if self.causal_share is None else f"{100 * self.causal_share:.3g}% causal"
        return ", ".join(filter(None, [causal, super().details()]))


@dataclass(frozen=True)
class CausalOrMasked(Corruption):
    """Two corruptions, of which a document's random number chooses one: a step is the same however it is split."""

    causal_share: float
    next_token: Corruption
    masked: Corruption

    def groups(self, seed: int, numbers: np.ndarray) -> list[tuple[Corruption, np.ndarray]]:
        draws = mix(streams(seed, DIRECTION, numbers)) >> np.uint64(32)
        causal = draws < round(self.causal_share * (1 << 32))
        groups = [(self.next_token, np.flatnonzero(causal)), (self.masked, np.flatnonzero(~causal))]
        return [group for group in groups if len(group[1])] or groups[:1]
