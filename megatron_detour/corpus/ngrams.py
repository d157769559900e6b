"""Hashes of all sequences of n words in texts, in numpy without a loop over words.

Words are maximal runs of letters and digits, compared without case and accents. Characters that are not seen, such as
soft hyphens, and combining marks are skipped, so that composed and decomposed text is the same.

A word is hashed as a polynomial of its characters modulo 2**64, and a sequence as one of its words' hashes. The hash of
any span follows from cumulative sums: with sums[i] = sum of values[j] * BASE**j over j < i, the span from s to e has
(sums[e] - sums[s]) * BASE**-s (the method of Karp and Rabin, 1987). As all values are pseudorandom 64-bit numbers, two
different sequences have the same hash with a probability of about 2**-64, or up to 2**-58 if one permutes the other.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from megatron_detour.counter_rng import GOLDEN, mix

PIECE = 1 << 16  # characters that are hashed at a time: the arrays fit in a cache
BASE = GOLDEN  # odd, and therefore invertible
SPACE = re.compile(r"\s")
UNKNOWN, BETWEEN, SKIPPED = map(np.uint64, range(3))  # what no hash of a character is; BETWEEN separates words
_values = np.zeros(0x110000, dtype=np.uint64)  # by code point: the hash of a letter or digit, or one of the above


def sequence_hashes(texts: list[str], n: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the hashes of all sequences of n words, uint64 [sequences], and the index of each one's text, int64."""
    joined = "\n".join(texts)
    ends = np.cumsum([len(text) + 1 for text in texts], dtype=np.int64)
    words, owners = np.zeros(0, np.uint64), np.zeros(0, np.int64)
    for start, end in _pieces(joined):
        more, places = _word_hashes(joined[start:end])
        words = np.concatenate([words, more])
        owners = np.concatenate([owners, np.searchsorted(ends, places + start, side="right")])
        count = len(words) - n + 1
        if count > 0:
            first = np.arange(count)
            within = owners[:count] == owners[n - 1 :]
            yield _span_hashes(words, first, first + n)[within], owners[:count][within]
            words, owners = words[count:], owners[count:]


def _pieces(text: str) -> Iterator[tuple[int, int]]:
    """Yield the bounds of consecutive pieces of about PIECE characters that end between words."""
    start = 0
    while start < len(text):
        space = SPACE.search(text, start + PIECE)
        end = space.end() if space else len(text)
        yield start, end
        start = end


def _word_hashes(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the hash of each word, uint64 [words], and the index of its first character, int64 [words]."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    values = _values.take(codes)
    if not values.all():
        for code in np.unique(codes[values == UNKNOWN]).tolist():
            _values[code] = _character_hash(chr(code))
        values = _values.take(codes)
    seen = values != SKIPPED
    places = None if seen.all() else np.flatnonzero(seen)
    if places is not None:
        values = values[places]
    edges = np.flatnonzero(np.diff(values > SKIPPED, prepend=False, append=False))
    starts, ends = edges[::2], edges[1::2]
    return mix(_span_hashes(values, starts, ends)), starts if places is None else places[starts]


def _character_hash(character: str) -> np.uint64:
    kind = unicodedata.category(character)
    if kind[0] == "M" or kind == "Cf":
        return SKIPPED
    if kind[0] not in "LN":
        return BETWEEN
    lower = character.lower()
    base, *marks = unicodedata.normalize("NFD", lower.casefold())
    if any(unicodedata.category(mark)[0] != "M" for mark in marks):
        base = lower[0]  # several letters, such as those of a ligature
    return mix(np.array([ord(base)], dtype=np.uint64))[0]


def _span_hashes(values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the hash of values[start:end], uint64, for each start and end; it does not depend on the place."""
    powers, inverses = _powers(1 << len(values).bit_length())
    sums = np.zeros(len(values) + 1, dtype=np.uint64)
    np.cumsum(values * powers[: len(values)], out=sums[1:])
    return (sums[ends] - sums[starts]) * inverses[starts]


@lru_cache(maxsize=4)
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return BASE**i and BASE**-i modulo 2**64 for i < count."""
    powers = np.ones((2, count), dtype=np.uint64)
    powers[0, 1:], powers[1, 1:] = BASE, pow(BASE, -1, 1 << 64)
    return tuple(np.cumprod(powers, axis=1))
