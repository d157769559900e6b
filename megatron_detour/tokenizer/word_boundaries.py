"""Where words begin in a stream of token ids, for masking whole words.

Two facts of an id decide, so that finding the words of a batch is two look-ups: whether it can go on with the token
before, and whether the token after it can go on with it. A word is a stretch of letters and digits; any other
character is a border, so that l'hôpital is three words (l, ', hôpital). A character that is spread over tokens stays
in one piece.
"""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_detour.errors import DetourError
from megatron_detour.tokenizer.token_bytes import ids_of, kind_of, text_of
from megatron_detour.tokenizer.vocabulary import Vocabulary, load_tokenizer

CONTINUATION = bytes(range(0x80, 0xC0))  # UTF-8's bytes after the first of a character


@dataclass(frozen=True)
class Words:
    """bool [ids] each: `goes_on` for tokens that may continue a word, `is_open` for those after which it may go on."""

    goes_on: np.ndarray
    is_open: np.ndarray

    @classmethod
    def of(cls, tokenizer_file: Path, vocabulary: Vocabulary) -> Words:
        """Reads a tokenizer's file. Raises DetourError for a kind that does not tell where words begin."""
        raw = json.loads(load_tokenizer(tokenizer_file).to_str())
        kind = kind_of(raw)
        if kind is None:
            raise DetourError(
                f"whole_word_masking: {tokenizer_file} is neither a byte-level BPE nor a WordPiece nor a SentencePiece "
                f"tokenizer (model type {raw['model'].get('type')}), so it does not tell where words begin; remove the "
                "key"
            )
        goes_on, is_open = (np.zeros(vocabulary.size, dtype=bool) for _ in range(2))
        added = {token["id"]: token["content"] for token in raw["added_tokens"]}
        for token, number in ids_of(raw["model"]):
            if number in added:
                continue
            if kind == "WordPiece":
                goes_on[number], is_open[number] = _word_piece(token, raw["model"])
            else:
                goes_on[number], is_open[number] = _ends(text_of(token, kind))
        for number, content in added.items():
            goes_on[number], is_open[number] = _ends(content.encode())
        special = vocabulary.special()
        return cls(goes_on & ~special, is_open & ~special)

    def first_tokens(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Where words begin in documents one after the other, int64 [words].

        tokens: int [positions]; lengths: int64 [documents], summing to `positions`. A special token is a word.
        """
        begins = np.zeros(len(tokens), dtype=bool)
        np.logical_and(self.goes_on.take(tokens[1:]), self.is_open.take(tokens[:-1]), out=begins[1:])
        np.logical_not(begins, out=begins)
        begins[np.cumsum(lengths) - lengths] = True
        return np.flatnonzero(begins)


def _word_piece(token: str, model: dict[str, Any]) -> tuple[bool, bool]:
    return token.startswith(model.get("continuing_subword_prefix") or "##"), True


def _ends(text: bytes) -> tuple[bool, bool]:
    """Whether a token with this text may continue a word, and whether a word may go on after it.

    A token that begins inside a character goes on with it. Nothing but such bytes do not tell their character: the
    word stays open. What a token that ends inside its first character begins is what most such characters are.
    """
    rest = text.lstrip(CONTINUATION)
    whole = rest.decode("utf-8", "ignore")
    begins_inside, ends_inside = len(rest) < len(text), whole.encode() != rest
    goes_on = begins_inside or (_in_word(whole[0]) if whole else ends_inside and _mostly_in_word(rest))
    is_open = ends_inside or (_in_word(whole[-1]) if whole else begins_inside)
    return goes_on, is_open


def _mostly_in_word(lead: bytes) -> bool:
    """Of the first bytes of a character."""
    missing = (lead[0] >= 0xC0) + (lead[0] >= 0xE0) + (lead[0] >= 0xF0) + 1 - len(lead)
    texts = [lead + bytes([byte]) + CONTINUATION[:1] * (missing - 1) for byte in CONTINUATION]
    characters = [text.decode("utf-8", "ignore") for text in texts]
    return sum(_in_word(character[0]) for character in characters if character) > len(texts) / 2


def _in_word(character: str) -> bool:
    """Letters, digits and the marks that go with letters."""
    return unicodedata.category(character)[0] in "LNM"
