"""Documents that share words in a row with texts that must not be trained on, such as the test texts of tasks."""

from __future__ import annotations

import gzip
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_detour.errors import DetourError
from megatron_detour.structured import parse_json

WORD = re.compile(r"[^\W_]+")
SUFFIXES = (".jsonl", ".jsonl.gz", ".txt")
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd: no bit of a word's hash is lost


class Overlap:
    """The runs of `words` words of some texts, lower-cased, as sorted 64-bit hashes.

    Two different runs have the same hash with a probability of 2 to the -64: among 10 million runs of excluded texts
    and 10 billion of documents, about 0.005 documents are dropped by accident.
    """

    def __init__(self, paths: Sequence[str], words: int) -> None:
        self._words = words
        self._hashes: dict[str, int] = {}  # of single words
        runs = [self._runs(text) for path in map(Path, paths) for text in _texts(path)]
        self._known = np.unique(np.concatenate(runs)) if runs else np.empty(0, np.uint64)
        if not len(self._known):
            raise DetourError(f"--exclude {' '.join(paths)}: no text of {words} words or more")

    def identity(self) -> dict[str, Any]:
        """Return what determines which documents are dropped."""
        return {"exclude_words": self._words, "exclude_sha256": hashlib.sha256(self._known.tobytes()).hexdigest()}

    def shared_by(self, text: str) -> bool:
        """Return whether the text has a run of words that one of the excluded texts has."""
        runs = self._runs(text)
        places = np.searchsorted(self._known, runs)
        return bool((self._known[np.minimum(places, len(self._known) - 1)] == runs).any())

    def _runs(self, text: str) -> np.ndarray:
        """Return the hash of each run of words, uint64 [runs]: a polynomial of the words' hashes."""
        hashes = self._hashes
        found = [hashes[word] if word in hashes else self._hash(word) for word in WORD.findall(text.lower())]
        single = np.array(found, dtype=np.uint64)
        count = len(single) - self._words + 1
        if count < 1:
            return np.empty(0, np.uint64)
        runs = np.zeros(count, np.uint64)
        for place in range(self._words):
            runs = runs * MULTIPLIER + single[place : place + count]
        return runs

    def _hash(self, word: str) -> int:
        digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        self._hashes[word] = value = int.from_bytes(digest, "little")
        return value


def _texts(path: Path) -> Iterator[str]:
    """Yield the texts of a file; of a folder, those of the files named test below it. Raises DetourError."""
    if path.is_dir():
        files = [file for file in sorted(path.rglob("test.*")) if file.name.endswith(SUFFIXES)]
        if not files:
            raise DetourError(f"--exclude {path}: no file named test ({', '.join(SUFFIXES)}) in this folder")
    else:
        files = [path]
    for file in files:
        yield from _texts_of_file(file)


def _texts_of_file(path: Path) -> Iterator[str]:
    if not path.name.endswith(SUFFIXES):
        raise DetourError(f"--exclude {path}: must end in {', '.join(SUFFIXES)}, or be a folder")
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DetourError(f"--exclude {path}: cannot read ({error})") from None
    if path.suffix == ".txt":
        yield text
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield from _strings(parse_json(line, f"{path}, line {number}"))


def _strings(value: Any) -> Iterator[str]:
    """Yield all texts of a JSON value; a list of words is one text."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list) and all(isinstance(each, str) for each in value):
        yield " ".join(value)
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)
