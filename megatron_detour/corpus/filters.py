"""Normalizing and filtering documents, and hashing them for deduplication.

A worker normalizes and filters its own documents. Equal and similar documents may be in different parts: they are found
when the parts are joined, from the hashes computed here.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from typing import Any

import numpy as np

from megatron_detour.corpus.exclusion import Exclusion
from megatron_detour.corpus.options import BuildOptions
from megatron_detour.errors import DetourError

LANGUAGE_CHARACTERS = 2_000  # of a document, from which its language is identified
WORD = re.compile(r"\w+")
SHINGLE = 5  # words
PERMUTATIONS = 128
MINHASH_SEED = 1


class Cleaner:
    """Cleans documents as the options of a build require. Raises DetourError if a package for it is missing."""

    def __init__(self, options: BuildOptions, exclusion: Exclusion | None = None) -> None:
        self._options = options
        self._exclusion = exclusion
        self._languages = _language_model(options.language) if options.language else None
        if options.deduplicate == "near":
            minhash_class()

    def clean(self, texts: list[str], removed: Counter[str]) -> list[str]:
        """Return the remaining documents, normalized; count the others in `removed` by reason."""
        if not self._filters():
            return texts
        form = self._options.normalize
        kept = []
        for text in (unicodedata.normalize(form, text) for text in texts) if form else texts:
            reason = self._reason_to_remove(text)
            if reason:
                removed[reason] += 1
            else:
                kept.append(text)
        return self._without_excluded(kept, removed) if self._exclusion else kept

    def _filters(self) -> bool:
        o = self._options
        return bool(o.normalize or o.min_chars or o.max_chars is not None or o.language or self._exclusion)

    def _without_excluded(self, texts: list[str], removed: Counter[str]) -> list[str]:
        excluded = self._exclusion.shared_by(texts)
        if excluded.any():
            removed["excluded"] += int(excluded.sum())
            texts = [text for text, drop in zip(texts, excluded.tolist(), strict=True) if not drop]
        return texts

    def _reason_to_remove(self, text: str) -> str | None:
        if len(text) < self._options.min_chars:
            return "short"
        if self._options.max_chars is not None and len(text) > self._options.max_chars:
            return "long"
        if self._languages and self._languages.classify(text[:LANGUAGE_CHARACTERS])[0] not in self._options.language:
            return "language"
        return None

    def columns(self, texts: list[str], lengths: np.ndarray) -> dict[str, np.ndarray]:
        """Return what the join needs for each document; lengths: int64 [texts], in tokens.

        length: int32 [texts]; if the options need them, held_out: bool [texts], and keys: uint64 [texts, keys, 2], of
        which equal (or similar) documents share one.
        """
        columns = {"length": lengths.astype("<i4")}
        if self._options.deduplicate == "near":
            rows = rows_per_band(self._options.similarity)
            bands = np.array([_bands(text, rows) for text in texts], dtype="<u8").reshape(-1, PERMUTATIONS // rows)
            columns["keys"] = np.stack(
                [bands, np.broadcast_to(np.arange(bands.shape[1], dtype="<u8"), bands.shape)], axis=2
            )
        if self._options.held_out or self._options.deduplicate == "exact":
            digests = b"".join(hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts)
            hashes = np.frombuffer(digests, dtype="<u8").reshape(-1, 2)
            if self._options.deduplicate == "exact":
                columns["keys"] = hashes[:, None]
            if self._options.held_out:
                columns["held_out"] = hashes[:, 0] < np.uint64(int(self._options.held_out * 2**64))
        return columns


def rows_per_band(similarity: float) -> int:
    """Return the rows with which locality-sensitive hashing finds pairs above about this similarity.

    With b bands of r rows, a pair of similarity (1 / b) ** (1 / r) probably shares a band (Leskovec, Rajaraman and
    Ullman, Mining of Massive Datasets, section 3.4).
    """
    return min(range(1, PERMUTATIONS + 1), key=lambda r: abs((1 / (PERMUTATIONS // r)) ** (1 / r) - similarity))


def _bands(text: str, rows: int) -> list[int]:
    words = WORD.findall(text.lower()) or [text]
    shingles = [" ".join(words[i : i + SHINGLE]) for i in range(max(len(words) - SHINGLE + 1, 1))]
    sketch = minhash_class()(num_perm=PERMUTATIONS, seed=MINHASH_SEED)
    sketch.update(shingles)
    bands = PERMUTATIONS // rows
    digest = np.array(sketch.digest()[: bands * rows], dtype="<u4").reshape(bands, rows)
    return [int.from_bytes(hashlib.blake2b(band.tobytes(), digest_size=8).digest(), "little") for band in digest]


def minhash_class() -> type:
    try:
        from rensa import RMinHash
    except ImportError:
        raise DetourError("--deduplicate near: requires rensa: pip install 'megatron-detour[clean]'") from None
    return RMinHash


def _language_model(wanted: tuple[str, ...]) -> Any:
    try:
        from py3langid import langid
    except ImportError:
        raise DetourError("--language: requires py3langid: pip install 'megatron-detour[clean]'") from None
    known = sorted(code for code, _ in langid.rank("a"))
    unknown = [code for code in wanted if code not in known]
    if unknown:
        raise DetourError(f"--language: py3langid does not support {unknown[0]!r}; it supports {' '.join(known)}")
    return langid
