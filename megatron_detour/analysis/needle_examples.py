"""Examples of the needle test: a fact in a document of a given length, and a question about it; and its options."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Annotated, NamedTuple

from megatron_detour.analysis.needle_facts import TEMPLATES, draw_fact, other_fact
from megatron_detour.errors import DetourError
from megatron_detour.settings import Choice, Entries, Range

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ABOVE_ZERO, SEED = Range(above=0), Range(least=0, below=2**31)
PLACES = {"start": 0.0, "middle": 0.5, "end": 1.0}
SHARES = {"train": 0.7, "dev": 0.15, "test": 0.15}
DOCUMENTS = 2000  # drawn from the texts
SPECIAL = 3  # [CLS] question [SEP] document [SEP]
LONGEST_WORD = 40  # characters per token of a document that are tokenized, so that a book is not
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


@dataclass(frozen=True)
class NeedleOptions:
    """Options of the needle test: each field is a flag of megatron-detour analyze needle. Defaults are the paper's."""

    language: Annotated[str, Choice(tuple(TEMPLATES)), "of the facts"] = "en"
    lengths: Annotated[
        tuple[Annotated[int, ABOVE_ZERO], ...],
        Entries(least=1, unique=True),
        "tokens of an example, the question included",
    ] = (512, 1024, 2048, 4096, 8192)
    examples: Annotated[int, ABOVE_ZERO, "examples, of which 70% train, 15% validate and 15% test"] = 1500
    seed: Annotated[int, SEED, "of facts and documents"] = 42
    train_seeds: Annotated[
        tuple[Annotated[int, SEED], ...], Entries(least=1, unique=True), "of the classifier, whose scores are averaged"
    ] = (42,)
    epochs: Annotated[int, ABOVE_ZERO, "passes over the training examples"] = 3
    learning_rate: Annotated[float, ABOVE_ZERO, "of AdamW, constant"] = 2e-5
    batch: Annotated[int, ABOVE_ZERO, "examples per step"] = 4
    dropout: Annotated[float, Range(least=0, below=1), "before each linear layer"] = 0.1
    batch_tokens: Annotated[int, ABOVE_ZERO, "tokens per forward pass of the encoder"] = 16_384


@dataclass(frozen=True)
class Needle:
    """An example: `ids` are [CLS] question [SEP] document [SEP], exactly `length` of them.

    The document holds a fact at `place`; `present` says whether the question is that fact, or the same template with
    other values.
    """

    ids: tuple[int, ...]
    length: int
    place: str
    present: bool
    split: str  # train, dev or test


class _Document(NamedTuple):
    ids: list[int]
    starts: list[int]  # tokens that begin a sentence


def make_needles(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], options: NeedleOptions) -> list[Needle]:
    """Return examples that are balanced over lengths, places and answers, in every split too.

    The question comes first, as in question answering: no length can cut it off. A document that is too short is
    continued by the next one. Facts, places and documents depend on the seed alone, not on the tokenizer. Raises
    DetourError for too few examples or texts, too short lengths, and a tokenizer without [CLS] and [SEP].
    """
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise DetourError(f"{tokenizer.name_or_path}: the tokenizer has no [CLS] or no [SEP]")
    refuse_few(options)
    cells = _cells(options)
    chosen = sorted(number % len(cells) for number in range(options.examples))
    haystack = _Haystack(tokenizer, documents, max(options.lengths))
    made = []
    for number, (cell, split) in enumerate(zip(chosen, splits(options.examples), strict=True)):
        rng = random.Random(f"{options.seed} {number}")
        length, place, present = cells[cell]
        ids = _needle(tokenizer, haystack, rng, options.language, length, place, present)
        made.append(Needle(ids, length, place, present, split))
    return made


def refuse_few(options: NeedleOptions) -> None:
    """Raise DetourError if a length, place and answer would be missing in a split."""
    least = 7 * len(_cells(options))  # 0.15 of 7 is one of each for dev and test
    if options.examples < least:
        few = f"{options.examples} examples are too few for {len(options.lengths)} lengths"
        raise DetourError(f"{few}; give at least {least}")


def _cells(options: NeedleOptions) -> list[tuple[int, str, bool]]:
    return list(product(options.lengths, PLACES, (True, False)))


def splits(count: int) -> list[str]:
    """Return a split for each example, so that any stretch of examples is divided by SHARES."""
    given = dict.fromkeys(SHARES, 0)
    names = []
    for number in range(1, count + 1):
        name = max(SHARES, key=lambda split: SHARES[split] * number - given[split])
        given[name] += 1
        names.append(name)
    return names


class _Haystack:
    """Documents as tokens, each tokenized when it is first used."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], longest: int) -> None:
        self.tokenizer, self.documents, self.longest = tokenizer, documents, longest
        self.read: dict[int, _Document] = {}

    def take(self, first: float, tokens: int) -> _Document:
        """Return this many tokens, from the start of the document at `first`, a fraction of them."""
        ids: list[int] = []
        starts: list[int] = []
        begin = int(first * len(self.documents))
        for number in range(begin, begin + len(self.documents)):
            document = self.document(number % len(self.documents))
            starts += [len(ids) + start for start in document.starts]
            ids += document.ids
            if len(ids) >= tokens:
                return _Document(ids[:tokens], [start for start in starts if start < tokens])
        raise DetourError(
            f"the documents have {len(ids):,} tokens, fewer than the {tokens:,} of one haystack; give more of them, or "
            "lower --lengths"
        )

    def document(self, number: int) -> _Document:
        if number not in self.read:
            text = self.documents[number][: LONGEST_WORD * self.longest]
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            # A token may begin with the space before its word, or after it.
            ends = {at for match in _SENTENCE_END.finditer(text) for at in match.span()}
            starts = [i for i, (start, _) in enumerate(encoded["offset_mapping"]) if start in ends]
            self.read[number] = _Document(encoded["input_ids"], [0, *starts])
        return self.read[number]


def _needle(
    tokenizer: PreTrainedTokenizerBase,
    haystack: _Haystack,
    rng: random.Random,
    language: str,
    length: int,
    place: str,
    present: bool,
) -> tuple[int, ...]:
    fact = draw_fact(language, rng)
    asked = fact if present else other_fact(fact, rng)
    encode = partial(tokenizer, add_special_tokens=False)
    question, needle = encode(asked.text)["input_ids"], encode(f" {fact.text}")["input_ids"]
    room = length - SPECIAL - len(question) - len(needle)
    if room < len(needle):
        raise DetourError(f"--lengths: {length} tokens do not hold a question, a fact and a document; give more")
    document = haystack.take(rng.random(), room)
    at = _insertion(document, PLACES[place])
    inside = document.ids[:at] + needle + document.ids[at:]
    return (tokenizer.cls_token_id, *question, tokenizer.sep_token_id, *inside, tokenizer.sep_token_id)


def _insertion(document: _Document, place: float) -> int:
    """Return the token before which the fact goes: the start, the end, or the sentence nearest to the middle."""
    target = round(place * len(document.ids))
    return min((*document.starts, len(document.ids)), key=lambda start: abs(start - target))
