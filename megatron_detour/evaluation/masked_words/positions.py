"""Which words are masked, decided on the text alone: the same ones for every model, whatever its tokenizer.

A word is a stretch of letters and digits, as in tokenizer/word_boundaries.py. A document is cut into windows at words;
of each window the same share of words is chosen, those with the smallest of their random numbers, which come from
(seed, number of the document, number of the word).
"""

from __future__ import annotations

import heapq
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from megatron_detour.corpus.documents import read_documents
from megatron_detour.counter_rng import GOLDEN, mix, streams
from megatron_detour.errors import DetourError

DOCUMENTS, WINDOWS, WORDS = range(3)  # purposes of random numbers
BYTES_A_WORD = 10  # of a window, at most: what has few words, such as a table of figures, would be too long for models


@dataclass(frozen=True)
class Window:
    """A stretch of a document and the words in it that are masked, by their first and one-past-last character."""

    document: int
    text: str
    chosen: tuple[tuple[int, int], ...]

    def words(self) -> list[str]:
        return [self.text[start:end] for start, end in self.chosen]


@dataclass(frozen=True)
class Corpus:
    """The documents that are measured, by their numbers in the file, and how often each word is in all of it."""

    documents: dict[int, str]
    counts: Counter[str]


@cache
def _word_pattern() -> re.Pattern[str]:
    """Letters and digits, and marks that go on with them: accents of their own, vowel signs. All are below 1F000."""
    marks = "".join(chr(at) for at in range(0x300, 0x1F000) if unicodedata.category(chr(at))[0] == "M")
    return re.compile(rf"[^\W_]+(?:[{marks}]+[^\W_]*)*")


def find_words(text: str) -> list[tuple[int, int]]:
    """First and one-past-last characters."""
    return [found.span() for found in _word_pattern().finditer(text)]


def folded(word: str) -> str:
    """The form by which words are looked up and counted."""
    return unicodedata.normalize("NFC", word).casefold()


def count_words(paths: Iterable[Path], text_key: str) -> Counter[str]:
    """How often each word, folded, is in the documents of files."""
    counts: Counter[str] = Counter()
    for path in paths:
        for text in read_documents(path, text_key):
            counts.update(_word_pattern().findall(text))
    return _folded(counts)


def _folded(counts: Counter[str]) -> Counter[str]:
    together: Counter[str] = Counter()
    for word, count in counts.items():
        together[folded(word)] += count
    return together


def read_corpus(path: Path, text_key: str, seed: int, count: int) -> Corpus:
    """The `count` documents of a file whose random numbers are the smallest. Raises DetourError for one without any."""
    counts: Counter[str] = Counter()

    def drawn() -> Iterator[tuple[int, int, str]]:
        for number, text in enumerate(read_documents(path, text_key)):
            counts.update(_word_pattern().findall(text))
            yield int(streams(seed, DOCUMENTS, np.array([number]))[0]), number, text

    chosen = heapq.nsmallest(count, drawn())
    if not counts:
        raise DetourError(f"{path}: holds no words, give a file with documents")
    return Corpus({number: text for _, number, text in sorted(chosen, key=lambda one: one[1])}, _folded(counts))


def windows_of(number: int, text: str, *, seed: int, words: int, windows: int, mask_rate: float) -> list[Window]:
    """Cuts a document into windows of at most `words` words and 10 times as many bytes; chooses `windows` of them.

    A window begins at a word and goes on to the next window's; what cannot be cut at words has no window. In each,
    `mask_rate` of the words are chosen, rounded and at least one.
    """
    places = find_words(text)
    drawn = _drawn(seed, WORDS, number, len(places))
    found = []
    for first, past, end in _cuts(text, places, words):
        kept = max(1, round(mask_rate * (past - first)))
        chosen = np.sort(first + np.argsort(drawn[first:past], kind="stable")[:kept])
        start = places[first][0]
        inside = tuple((places[word][0] - start, places[word][1] - start) for word in chosen)
        found.append(Window(number, text[start:end], inside))
    order = np.argsort(_drawn(seed, WINDOWS, number, len(found)), kind="stable")[:windows]
    return [found[at] for at in sorted(order)]


def _drawn(seed: int, purpose: int, number: int, count: int) -> np.ndarray:
    """The random numbers of the first `count` things of a document, uint64."""
    start = streams(seed, purpose, np.array([number]))
    with np.errstate(over="ignore"):
        return mix(start + np.arange(count, dtype=np.uint64) * np.uint64(GOLDEN))


def _cuts(text: str, places: Sequence[tuple[int, int]], words: int) -> Iterator[tuple[int, int, int]]:
    """First and one-past-last words of windows, and the characters that they end before."""
    first = 0
    while first < len(places):
        start = end = places[first][0]
        past = first
        while past < len(places) and past - first < words:
            after = places[past + 1][0] if past + 1 < len(places) else len(text)
            if len(text[start:after].encode()) > BYTES_A_WORD * words:
                break
            past, end = past + 1, after
        if past > first:
            yield first, past, len(text[:end].rstrip())
        first = max(past, first + 1)


@dataclass(frozen=True)
class DomainRule:
    """What makes a word one of the domain: its share of words against that in general text, and how often it is."""

    ratio: float = 8
    occurrences: int = 3
    letters: int = 4


def domain_words(counts: Counter[str], reference: Counter[str], rule: DomainRule) -> frozenset[str]:
    """Words that are `ratio` times as frequent as in the reference, where one that never occurs is infinitely so."""
    here, there = counts.total(), reference.total()
    return frozenset(
        word
        for word, count in counts.items()
        if count >= rule.occurrences
        and sum(character.isalpha() for character in word) >= rule.letters
        and count * there >= rule.ratio * reference[word] * here
    )


def read_words(path: Path) -> tuple[frozenset[str], int]:
    """The words of a file, one a line, and how many lines hold no word or several. Raises DetourError for no word."""
    if not path.is_file():
        raise DetourError(f"{path}: no such file")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DetourError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    words = frozenset(folded(line) for line in lines if _word_pattern().fullmatch(line))
    if not words:
        raise DetourError(f"{path}: holds no word, give one a line, of letters and digits alone")
    return words, sum(not _word_pattern().fullmatch(line) for line in lines)
