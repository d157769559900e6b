"""Masked language modeling: a fraction of the tokens is predicted from the rest of the document."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Self

from megatron_detour.amounts import TEXT_SCHEMA, read_tokens
from megatron_detour.objectives.base import Objective
from megatron_detour.objectives.masking import Masking
from megatron_detour.settings import Enclosing, Parsed, Range

if TYPE_CHECKING:
    from megatron_detour.tokenizer.vocabulary import Vocabulary
    from megatron_detour.tokenizer.word_boundaries import Words

SHARE, USUAL_RATES = Range(above=0, below=1), (0.05, 0.50)
STEPS = "a mapping of tokens, ascending and above 0, to mask rates above 0 and below 1, such as {500M: 0.3, 800M: 0.15}"


def _rate_steps(raw: Any, enclosing: Enclosing) -> tuple[tuple[int, float], ...]:
    """Read a mapping of tokens to rates, or the list of pairs that a run directory stores."""
    pairs = list(raw.items()) if isinstance(raw, dict) else raw
    if not isinstance(pairs, list | tuple) or not all(
        isinstance(each, list | tuple) and len(each) == 2 for each in pairs
    ):
        raise ValueError(STEPS)
    steps = tuple((read_tokens(tokens, enclosing), rate) for tokens, rate in pairs)
    begins = [0, *(begin for begin, _ in steps)]
    valid = all(type(rate) in (int, float) and SHARE.fault(rate) is None for _, rate in steps)
    if not valid or begins != sorted(set(begins)):
        raise ValueError(STEPS)
    return steps


_MAPPING = {"propertyNames": TEXT_SCHEMA, "additionalProperties": {"type": "number"} | SHARE.schema()}
RateSteps = Annotated[
    tuple[tuple[int, float], ...],
    Parsed(_rate_steps, {"type": ["object", "array"], **_MAPPING, "items": {"type": "array"}}),
]


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
    mask_rate_steps: Annotated[
        RateSteps, "mask rates from these tokens of the phase on, such as `{500M: 0.3, 800M: 0.15}`"
    ] = ()
    whole_word_masking: Annotated[bool, "mask whole words (section 4)"] = False
    longest_span: Annotated[
        int | None, Range(least=2, most=100), "mask spans of 1 to this many tokens or whole words (section 4)"
    ] = None
    entities: Annotated[
        str | None, "text file of words and phrases, one per line, that are masked before others (section 4)"
    ] = None

    @classmethod
    def for_validation(cls, mask_rate: float) -> Self:
        return cls(mask_rate)

    def bind(self, vocabulary: Vocabulary, words: Words | None = None) -> Masking:
        units = words if self.whole_word_masking else None
        entities = words.entities[self.entities] if self.entities else None
        return Masking(vocabulary, self.mask_rate, units, self.longest_span, entities)

    def at(self, done: int, tokens: int) -> Self:
        first, last = self.mask_rate, self.mask_rate_end
        rate = first if last is None else first + (last - first) * done / tokens
        for begin, step_rate in self.mask_rate_steps:
            rate = step_rate if begin < done else rate
        return dataclasses.replace(self, mask_rate=rate, mask_rate_end=None, mask_rate_steps=())

    def labeled_share(self, mean_document: float, tokens: int) -> float:
        if self.mask_rate_end is not None:
            return (self.mask_rate + self.mask_rate_end) / 2
        begins, rates = zip((0, self.mask_rate), *self.mask_rate_steps, strict=True)
        lasts = [end - begin for begin, end in zip(begins, (*begins[1:], tokens), strict=True)]
        return sum(rate * last for rate, last in zip(rates, lasts, strict=True)) / tokens

    def faults(self, tokens: int) -> Iterator[tuple[str, str]]:
        if self.mask_rate_steps and self.mask_rate_end is not None:
            yield "mask_rate_end", "set either mask_rate_end or mask_rate_steps"
        for begin, _ in self.mask_rate_steps:
            if begin >= tokens:
                yield "mask_rate_steps", f"{begin} tokens are not before the end of the phase, at {tokens}"

    @property
    def needs_word_boundaries(self) -> bool:
        return self.whole_word_masking or self.entities is not None

    def details(self) -> str:
        first, last = self.mask_rate, self.mask_rate_end
        if first is None:
            return ""
        end = "" if last in (None, first) else f" to {100 * last:.3g}%"
        rates = [
            f"{100 * first:.3g}%{end} masked",
            *(f"then {100 * rate:.3g}%" for _, rate in self.mask_rate_steps or ()),
        ]
        spans = f"spans of up to {self.longest_span}" if self.longest_span else ""
        units = " ".join(filter(None, [spans, "whole words" if self.whole_word_masking else spans and "tokens"]))
        return ", ".join(filter(None, [*rates, units, "listed words first" if self.entities else ""]))

    def warnings(self) -> Iterator[tuple[str, str]]:
        low, high = USUAL_RATES
        rates = [("mask_rate", self.mask_rate), ("mask_rate_end", self.mask_rate_end)]
        for key, rate in (*rates, *(("mask_rate_steps", rate) for _, rate in self.mask_rate_steps)):
            if rate is not None and not low <= rate <= high:
                yield key, f"{rate:g} is outside {low:g} to {high:g}; 0.15 to 0.3 is usual"
