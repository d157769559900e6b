"""Which words are masked. This depends on the text alone, so it is the same for models with different tokenizers.

A word is a run of letters and digits, as in tokenizer/word_boundaries.py. A document is split at words into windows;
in each window the same fraction of words is chosen, those with the smallest random numbers, which are functions of
(seed, document number, word number).
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

DOCUMENTS, WINDOWS, WORDS = range(3)  # streams of random numbers
BYTES_A_WORD = 10  # of a window, at most: what has few words, such as a table of figures, would be too long for models


@dataclass(frozen=True)
class Window:
    """A part of a document and its masked words, by start and end character."""

    document: int
    text: str
    chosen: tuple[tuple[int, int], ...]

    def words(self) -> list[str]:
        return [self.text[start:end] for start, end in self.chosen]


@dataclass(frozen=True)
class Corpus:
    """The chosen documents, by their numbers in the file, and the word counts of the whole file."""

    documents: dict[int, str]
    counts: Counter[str]


@cache
def _word_pattern() -> re.Pattern[str]:
    """Letters, digits and the combining marks that continue them: accents, vowel signs. All are below U+1F000."""
    marks = "".join(chr(at) for at in range(0x300, 0x1F000) if unicodedata.category(chr(at))[0] == "M")
    return re.compile(rf"[^\W_]+(?:[{marks}]+[^\W_]*)*")


def find_words(text: str) -> list[tuple[int, int]]:
    """Return the start and end characters of the words."""
    return [match.span() for match in _word_pattern().finditer(text)]


def folded(word: str) -> str:
    """Return the form in which words are looked up and counted."""
    return unicodedata.normalize("NFC", word).casefold()


def count_words(paths: Iterable[Path], text_key: str) -> Counter[str]:
    """Return the counts of folded words in the documents of files."""
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
    """Return the `count` documents with the smallest random numbers. Raises DetourError for a file without words."""
    counts: Counter[str] = Counter()

    def drawn() -> Iterator[tuple[int, int, str]]:
        for number, text in enumerate(read_documents(path, text_key)):
            counts.update(_word_pattern().findall(text))
            yield int(streams(seed, DOCUMENTS, np.array([number]))[0]), number, text

    chosen = heapq.nsmallest(count, drawn())
    if not counts:
        raise DetourError(f"{path}: no words; give a file with documents")
    return Corpus({number: text for _, number, text in sorted(chosen, key=lambda one: one[1])}, _folded(counts))


def windows_of(number: int, text: str, *, seed: int, words: int, windows: int, mask_rate: float) -> list[Window]:
    """Split a document into windows of at most `words` words and 10 times as many bytes; choose `windows` of them.

    A window extends from a word to the start of the next window; text that cannot be split at words has no window.
    `mask_rate` of each window's words are masked, rounded, at least one.
    """
    places = find_words(text)
    drawn = _drawn(seed, WORDS, number, len(places))
    candidates = []
    for first, past, end in _cuts(text, places, words):
        kept = max(1, round(mask_rate * (past - first)))
        chosen = np.sort(first + np.argsort(drawn[first:past], kind="stable")[:kept])
        start = places[first][0]
        inside = tuple((places[word][0] - start, places[word][1] - start) for word in chosen)
        candidates.append(Window(number, text[start:end], inside))
    order = np.argsort(_drawn(seed, WINDOWS, number, len(candidates)), kind="stable")[:windows]
    return [candidates[at] for at in sorted(order)]


def _drawn(seed: int, purpose: int, number: int, count: int) -> np.ndarray:
    """Return the random numbers of a document's first `count` items, uint64."""
    start = streams(seed, purpose, np.array([number]))
    with np.errstate(over="ignore"):
        return mix(start + np.arange(count, dtype=np.uint64) * np.uint64(GOLDEN))


def _cuts(text: str, places: Sequence[tuple[int, int]], words: int) -> Iterator[tuple[int, int, int]]:
    """Return start and end words of windows, and their end characters."""
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
    """The rule for domain words: relative frequency compared with general text, number of occurrences, length."""

    ratio: float = 8
    occurrences: int = 3
    letters: int = 4


def domain_words(counts: Counter[str], reference: Counter[str], rule: DomainRule) -> frozenset[str]:
    """Return words that are `ratio` times as frequent as in the reference (a word absent there always qualifies)."""
    corpus_words, reference_words = counts.total(), reference.total()
    return frozenset(
        word
        for word, count in counts.items()
        if count >= rule.occurrences
        and sum(character.isalpha() for character in word) >= rule.letters
        and count * reference_words >= rule.ratio * reference[word] * corpus_words
    )


def read_words(path: Path) -> tuple[frozenset[str], int]:
    """Return the words of a file, one per line, and the number of other lines. Raises DetourError if it has no word."""
    if not path.is_file():
        raise DetourError(f"{path}: no such file")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DetourError(f"{path}: cannot read as UTF-8 text ({error})") from None
    words = frozenset(folded(line) for line in lines if _word_pattern().fullmatch(line))
    if not words:
        raise DetourError(f"{path}: no words; write one per line, of letters and digits only")
    return words, sum(not _word_pattern().fullmatch(line) for line in lines)
