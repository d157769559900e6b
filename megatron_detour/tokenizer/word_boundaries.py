"""Word boundaries in a sequence of token ids, for whole-word masking.

Two properties of an id decide, so that finding the words of a batch takes two lookups: whether it may continue the word
of the previous token, and whether the next token may continue its word. A word is a run of letters and digits; any
other character is a boundary, so that l'hôpital is three words (l, ', hôpital). The bytes of one character are never
separated.
"""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_detour.errors import DetourError
from megatron_detour.tokenizer.token_bytes import token_bytes, tokenizer_kind, vocabulary_items
from megatron_detour.tokenizer.vocabulary import Vocabulary, load_tokenizer

if TYPE_CHECKING:
    from megatron_detour.tokenizer.entities import Entities

CONTINUATION = bytes(range(0x80, 0xC0))  # UTF-8 bytes after the first of a character


@dataclass(frozen=True)
class Words:
    """bool [ids] each: `continues` is true if a token may continue a word, `is_open` if the next token may do so.

    `entities` are the phrases that a run's objectives mask before others.
    """

    continues: np.ndarray
    is_open: np.ndarray
    entities: dict[str, Entities] = field(default_factory=dict)  # by file

    @classmethod
    def from_file(cls, tokenizer_file: Path, vocabulary: Vocabulary) -> Words:
        """Read a tokenizer's file. Raises DetourError for a kind without known word boundaries."""
        raw = json.loads(load_tokenizer(tokenizer_file).to_str())
        kind = tokenizer_kind(raw)
        if kind is None:
            raise DetourError(
                f"whole_word_masking, entities: {tokenizer_file} is not a byte-level BPE, WordPiece or SentencePiece "
                f"tokenizer (model type {raw['model'].get('type')}), so its word boundaries are unknown; remove these "
                "keys"
            )
        continues, is_open = (np.zeros(vocabulary.size, dtype=bool) for _ in range(2))
        added = {token["id"]: token["content"] for token in raw["added_tokens"]}
        for token, number in vocabulary_items(raw["model"]):
            if number in added:
                continue
            if kind == "WordPiece":
                continues[number], is_open[number] = _word_piece(token, raw["model"])
            else:
                continues[number], is_open[number] = _ends(token_bytes(token, kind))
        for number, content in added.items():
            continues[number], is_open[number] = _ends(content.encode())
        special = vocabulary.special()
        return cls(continues & ~special, is_open & ~special)

    def first_tokens(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return the positions where words begin in concatenated documents, int64 [words].

        tokens: int [positions]; lengths: int64 [documents], with sum `positions`. A special token is a word.
        """
        begins = np.zeros(len(tokens), dtype=bool)
        np.logical_and(self.continues.take(tokens[1:]), self.is_open.take(tokens[:-1]), out=begins[1:])
        np.logical_not(begins, out=begins)
        begins[np.cumsum(lengths) - lengths] = True
        return np.flatnonzero(begins)


def _word_piece(token: str, model: dict[str, Any]) -> tuple[bool, bool]:
    return token.startswith(model.get("continuing_subword_prefix") or "##"), True


def _ends(text: bytes) -> tuple[bool, bool]:
    """Return whether a token with this text may continue a word, and whether the next token may continue its word.

    A token that begins inside a character continues it. If it consists only of such bytes, its character is unknown,
    and the word remains open. A token that ends inside its first character counts as what most characters with these
    first bytes are.
    """
    rest = text.lstrip(CONTINUATION)
    whole = rest.decode("utf-8", "ignore")
    begins_inside, ends_inside = len(rest) < len(text), whole.encode() != rest
    continues = begins_inside or (_in_word(whole[0]) if whole else ends_inside and _mostly_in_word(rest))
    is_open = ends_inside or (_in_word(whole[-1]) if whole else begins_inside)
    return continues, is_open


def _mostly_in_word(lead: bytes) -> bool:
    """Return whether most characters with these first bytes are part of words."""
    missing = (lead[0] >= 0xC0) + (lead[0] >= 0xE0) + (lead[0] >= 0xF0) + 1 - len(lead)
    texts = [lead + bytes([byte]) + CONTINUATION[:1] * (missing - 1) for byte in CONTINUATION]
    characters = [text.decode("utf-8", "ignore") for text in texts]
    return sum(_in_word(character[0]) for character in characters if character) > len(texts) / 2


def _in_word(character: str) -> bool:
    """Return whether a character is a letter, a digit or a combining mark."""
    return unicodedata.category(character)[0] in "LNM"
