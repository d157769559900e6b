"""The pieces of a tokenizer's vocabulary and the text that each stands for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from megatron_detour.tokenizer.vocabulary import Vocabulary, load_tokenizer

SPACE = "▁"  # SentencePiece's mark of a space
BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's way out for characters it does not know


def byte_lengths(tokenizer_file: Path, vocabulary: Vocabulary) -> np.ndarray:
    """How many bytes of UTF-8 each id stands for, int64 [size]; 0 for special ids.

    Exact for byte-level BPE and SentencePiece. A WordPiece that begins a word counts the space before it.
    """
    raw = json.loads(load_tokenizer(tokenizer_file).to_str())
    kind, prefix = kind_of(raw), raw["model"].get("continuing_subword_prefix") or "##"
    lengths = np.zeros(vocabulary.size, dtype=np.int64)
    for piece, number in ids_of(raw["model"]):
        if kind == "WordPiece":
            lengths[number] = len(piece.removeprefix(prefix).encode()) + (not piece.startswith(prefix))
        else:
            lengths[number] = len(text_of(piece, kind))
    for token in raw["added_tokens"]:
        lengths[token["id"]] = len(token["content"].encode())
    lengths[vocabulary.special()] = 0
    return lengths


def kind_of(raw: dict[str, Any]) -> str | None:
    """WordPiece, ByteLevel or SentencePiece, of a tokenizer.json; None for another kind."""
    parts = {part.get("type"): part for part in _parts(raw)}
    model = raw["model"].get("type")
    if model == "WordPiece":
        return model
    if model == "BPE" and "ByteLevel" in parts:
        return "ByteLevel"
    spaces = (json.dumps(parts.get(name, {}), ensure_ascii=False) for name in ("Metaspace", "Replace"))
    return "SentencePiece" if model in ("BPE", "Unigram") and any(SPACE in part for part in spaces) else None


def _parts(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """The pre-tokenizers and decoders, those of a sequence one by one."""
    parts = []
    for name, plural in (("pre_tokenizer", "pretokenizers"), ("decoder", "decoders")):
        part = raw.get(name) or {}
        parts += part.get(plural, [part])
    return parts


def ids_of(model: dict[str, Any]) -> list[tuple[str, int]]:
    """Pieces with their ids, of a tokenizer.json's model."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        return list(vocabulary.items())
    return [(piece, number) for number, (piece, _) in enumerate(vocabulary)]


def text_of(token: str, kind: str | None) -> bytes:
    """The text that a token of the vocabulary stands for."""
    if kind == "ByteLevel":
        return b"".join(BYTE_OF.get(character, character.encode()) for character in token)
    byte = BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ").encode()


def _byte_characters() -> dict[str, bytes]:
    """The characters of a byte-level vocabulary: printable Latin-1 as it is, the other bytes from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    characters = {chr(byte): bytes([byte]) for byte in printable}
    return characters | {chr(256 + i): bytes([byte]) for i, byte in enumerate(others)}


BYTE_OF = _byte_characters()
