"""The text, in bytes, that each token of a vocabulary represents."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from megatron_detour.tokenizer.vocabulary import Vocabulary, load_tokenizer

SPACE = "▁"  # SentencePiece's symbol for a space
BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's byte fallback


def byte_lengths(tokenizer_file: Path, vocabulary: Vocabulary) -> np.ndarray:
    """Return the number of UTF-8 bytes that each id represents, int64 [size]; 0 for special ids.

    Exact for byte-level BPE and SentencePiece. A WordPiece token that begins a word counts the space before it.
    """
    raw = json.loads(load_tokenizer(tokenizer_file).to_str())
    kind, prefix = tokenizer_kind(raw), raw["model"].get("continuing_subword_prefix") or "##"
    lengths = np.zeros(vocabulary.size, dtype=np.int64)
    for token, number in vocabulary_items(raw["model"]):
        if kind == "WordPiece":
            lengths[number] = len(token.removeprefix(prefix).encode()) + (not token.startswith(prefix))
        else:
            lengths[number] = len(token_bytes(token, kind))
    for token in raw["added_tokens"]:
        lengths[token["id"]] = len(token["content"].encode())
    lengths[vocabulary.special()] = 0
    return lengths


def tokenizer_kind(raw: dict[str, Any]) -> str | None:
    """Return the kind of a tokenizer.json: WordPiece, ByteLevel or SentencePiece; None for any other."""
    parts, model = _parts(raw), raw["model"].get("type")
    if model == "WordPiece":
        return model
    if model == "BPE" and any(part.get("type") == "ByteLevel" for part in parts):
        return "ByteLevel"
    spaces = (json.dumps(part, ensure_ascii=False) for part in parts if part.get("type") in ("Metaspace", "Replace"))
    return "SentencePiece" if model in ("BPE", "Unigram") and any(SPACE in part for part in spaces) else None


def _parts(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the normalizers, pre-tokenizers and decoders, with sequences flattened."""
    parts = []
    for name, plural in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers"), ("decoder", "decoders")):
        part = raw.get(name) or {}
        parts += part.get(plural, [part])
    return parts


def vocabulary_items(model: dict[str, Any]) -> list[tuple[str, int]]:
    """Return tokens and ids of a tokenizer.json's model."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        return list(vocabulary.items())
    return [(token, number) for number, (token, _) in enumerate(vocabulary)]


def token_bytes(token: str, kind: str | None) -> bytes:
    """Return the UTF-8 text that a token represents."""
    if kind == "ByteLevel":
        return b"".join(BYTE_OF.get(character, character.encode()) for character in token)
    byte = BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ").encode()


def _byte_characters() -> dict[str, bytes]:
    """Return the bytes of a byte-level vocabulary's characters: printable Latin-1 unchanged, other bytes from 256."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    characters = {chr(byte): bytes([byte]) for byte in printable}
    return characters | {chr(256 + i): bytes([byte]) for i, byte in enumerate(others)}


BYTE_OF = _byte_characters()
