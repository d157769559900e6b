"""Texts that must not be trained on, such as the test texts of downstream tasks, and the documents that contain them.

A document is excluded if it shares a sequence of N words with such a text. Sequences are compared by 64-bit hash
(ngrams.py): with two million excluded sequences, one document among 100 billion words is dropped by mistake with a
probability of about 1%.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_detour.corpus.documents import read_shard
from megatron_detour.corpus.journal import PartFiles
from megatron_detour.corpus.ngrams import sequence_hashes
from megatron_detour.corpus.records import TextKeys
from megatron_detour.corpus.sources import COMPRESSIONS, InputShard, is_text, printable, walk
from megatron_detour.errors import DetourError
from megatron_detour.structured import parse_json

KINDS = tuple(kind + compression for kind in (".jsonl", ".json", ".txt") for compression in ("", *COMPRESSIONS))
TEST_FILES = tuple(f"test{kind}" for kind in KINDS)
SLOTS = 16  # of the filter, per sequence


class Exclusion:
    """Sequences of `words` words; hashes: distinct and sorted, uint64 [sequences], at least one."""

    def __init__(self, hashes: np.ndarray, words: int) -> None:
        self._hashes, self._words = hashes, words
        # One bit per slot, chosen by the first bits of a hash: it fits in a cache and spares nearly all searches.
        bits = (SLOTS * len(hashes)).bit_length()
        self._shift = np.uint64(64 - bits)
        taken = np.zeros(1 << bits, dtype=bool)
        taken[hashes >> self._shift] = True
        self._filter = np.packbits(taken, bitorder="little")

    @classmethod
    def read(cls, names: tuple[str, ...], words: int) -> Exclusion:
        """Read files, and folders' files named test.*. Raises DetourError, also if no text has so many words."""
        hashes = [hashes for name in excluded_files(names) for hashes, _ in sequence_hashes(read_texts(name), words)]
        distinct = np.unique(np.concatenate(hashes)) if hashes else []
        if not len(distinct):
            raise DetourError(f"--exclude {' '.join(names)}: no text has {words} words; set a lower --exclude-words")
        return cls(distinct, words)

    @classmethod
    def load(cls, folder: Path, identity: str, words: int) -> Exclusion:
        """Map the file that `save` has written: all processes of a machine share its memory."""
        return cls(np.memmap(_path(folder, identity), "<u8", "r"), words)

    def save(self, folder: Path) -> None:
        files = PartFiles(folder, self.identity)
        try:
            files.append({"excluded": self._hashes.astype("<u8")})
            files.finish()
        finally:
            files.discard()

    @cached_property
    def identity(self) -> str:
        return hashlib.sha256(self._hashes.astype("<u8").tobytes()).hexdigest()

    def facts(self) -> dict[str, Any]:
        """Return what the corpus's bytes depend on: the sequences, whatever the files' names and order."""
        number = len(self._hashes)
        return {"exclude_words": self._words, "exclude_sequences": number, "exclude_sha256": self.identity}

    def shared_by(self, texts: list[str]) -> np.ndarray:
        """Return which texts contain an excluded sequence, bool [texts]."""
        shared = np.zeros(len(texts), dtype=bool)
        for hashes, owners in sequence_hashes(texts, self._words):
            slots = hashes >> self._shift
            taken = self._filter[slots >> np.uint64(3)] >> (slots & np.uint64(7)).astype(np.uint8) & np.uint8(1)
            maybe = np.flatnonzero(taken)
            places = np.searchsorted(self._hashes, hashes[maybe])
            found = self._hashes.take(places, mode="clip") == hashes[maybe]
            shared[owners[maybe[found]]] = True
        return shared


def _path(folder: Path, identity: str) -> Path:
    return folder / f"{identity}.excluded"


def excluded_files(names: tuple[str, ...]) -> list[str]:
    """Return the files among `names`, and the files named test.* below the folders. Raises DetourError."""
    files = []
    for name in names:
        if Path(name).is_dir():
            found = [path for path in walk(name) if Path(path).name in TEST_FILES]
            if not found:
                raise DetourError(f"--exclude {name}: no file below it is named {', '.join(TEST_FILES)}")
            files += found
        elif not Path(name).is_file():
            raise DetourError(f"--exclude {name}: no such file or folder")
        elif not name.endswith(KINDS):
            raise DetourError(f"--exclude {name}: files must end in {', '.join(KINDS)}")
        else:
            files.append(name)
    return files


def read_texts(name: str) -> list[str]:
    """Return the texts of a file: every string of a JSON Lines file, under any key, or a whole text file.

    The strings of a list, such as tokens, are one text. Raises DetourError.
    """
    block = next(read_shard(InputShard("file", name, 0, 0, 0), TextKeys()))
    if block.rejects:
        raise DetourError(f"--exclude {printable(name)}: {block.rejects[0][1]}")
    if is_text(name):
        return block.texts
    lines = block.texts[0].split("\n") if block.texts else []
    values = (parse_json(line, f"{printable(name)}, line {n}") for n, line in enumerate(lines, 1) if line.strip())
    return [text for value in values for text in _strings(value)]


def _strings(value: Any) -> Iterator[str]:
    left = [value]
    while left:  # not recursive: JSON may be nested more deeply than calls
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list):
            yield " ".join(item for item in value if isinstance(item, str))
            left += [item for item in value if not isinstance(item, str)]
