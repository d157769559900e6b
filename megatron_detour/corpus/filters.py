"""What is done to documents before they become ids, and what is known of each for what is done to all of them.

A worker normalises and filters its own documents; equal and similar documents, which may lie in different parts, are
found when the parts are joined, from the hashes that are taken here.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from typing import Any

import numpy as np

from megatron_detour.corpus.options import BuildOptions
from megatron_detour.errors import DetourError

LANGUAGE_CHARACTERS = 2_000  # of a document that its language is told from
WORD = re.compile(r"\w+")
SHINGLE = 5  # words
PERMUTATIONS = 128
MINHASH_SEED = 1


class Cleaner:
    """Cleans documents by the options of a build. Raises DetourError where a package for it is missing."""

    def __init__(self, options: BuildOptions) -> None:
        self._options = options
        self._languages = _language_model(options.language) if options.language else None
        if options.deduplicate == "near":
            minhash_class()

    def clean(self, texts: list[str], removed: Counter[str]) -> list[str]:
        """The documents that stay, normalised; the others are counted in `removed` by the reason."""
        if not self._filters():
            return texts
        form = self._options.normalize
        stay = []
        for text in (unicodedata.normalize(form, text) for text in texts) if form else texts:
            reason = self._reason_to_remove(text)
            if reason:
                removed[reason] += 1
            else:
                stay.append(text)
        return stay

    def _filters(self) -> bool:
        o = self._options
        return bool(o.normalize or o.min_chars or o.max_chars is not None or o.language)

    def _reason_to_remove(self, text: str) -> str | None:
        if len(text) < self._options.min_chars:
            return "short"
        if self._options.max_chars is not None and len(text) > self._options.max_chars:
            return "long"
        if self._languages and self._languages.classify(text[:LANGUAGE_CHARACTERS])[0] not in self._options.language:
            return "language"
        return None

    def columns(self, texts: list[str], lengths: np.ndarray) -> dict[str, np.ndarray]:
        """What the join must know of each document; lengths: int64 [texts], in tokens.

        length int32 [texts]; where the options need them: held_out bool [texts], keys uint64 [texts, keys, 2], of which
        equal (or similar) documents share one.
        """
        columns = {"length": lengths.astype("<i4")}
        if self._options.deduplicate == "near":
            rows = rows_a_band(self._options.similarity)
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


def rows_a_band(similarity: float) -> int:
    """The rows with which locality-sensitive hashing finds documents from about this similarity on.

    With b bands of r rows a pair of similarity (1 / b) ** (1 / r) meets in some band more often than not (Leskovec,
    Rajaraman and Ullman, Mining of Massive Datasets, section 3.4).
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
        raise DetourError("--deduplicate near: needs the package rensa: pip install 'megatron-detour[clean]'") from None
    return RMinHash


def _language_model(wanted: tuple[str, ...]) -> Any:
    try:
        from py3langid import langid
    except ImportError:
        raise DetourError("--language: needs the package py3langid: pip install 'megatron-detour[clean]'") from None
    known = sorted(code for code, _ in langid.rank("a"))
    unknown = [code for code in wanted if code not in known]
    if unknown:
        raise DetourError(f"--language: {unknown[0]!r} is no code of py3langid; it knows {' '.join(known)}")
    return langid
