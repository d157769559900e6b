"""Deduplication of a whole corpus: keep the documents that share no key with an earlier one.

Equal documents share a hash, similar ones a MinHash band. Keys are partitioned into files by value, so that each file
fits into memory and equal keys are in the same file. Otherwise memory grows by eight bytes per document.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

IN_MEMORY = 1 << 23  # keys compared at a time
MAX_FILES = 512
ENTRY = np.dtype([("key", "<u8", (2,)), ("document", "<i8")])


def first_occurrences(keys: Iterable[np.ndarray], documents: int, folder: Path) -> np.ndarray:
    """Return bool [documents]: true for those that share no key with an earlier one, directly or transitively.

    keys: uint64 [n, keys, 2] for each part in order. Temporary files are created in `folder`.
    """
    parent = np.arange(documents, dtype=np.int64)
    for entries in _partition(keys, documents, folder):
        order = np.lexsort((entries["document"], entries["key"][:, 1], entries["key"][:, 0]))
        ordered, numbers = entries["key"][order], entries["document"][order]
        same = np.flatnonzero((ordered[1:] == ordered[:-1]).all(axis=1))
        for a, b in zip(numbers[same].tolist(), numbers[same + 1].tolist(), strict=True):
            a, b = _root(parent, a), _root(parent, b)
            parent[max(a, b)] = min(a, b)
    return parent == np.arange(documents)


def _partition(keys: Iterable[np.ndarray], documents: int, folder: Path) -> Iterator[np.ndarray]:
    """Yield groups of entries, such that equal keys are in the same group."""
    files = None
    start = 0
    with ExitStack() as stack:
        for part in keys:
            if files is None:
                slices = min(-(-documents * part.shape[1] // IN_MEMORY), MAX_FILES)
                paths = [folder / f"keys-{number}" for number in range(slices)]
                files = [stack.enter_context(path.open("wb")) for path in paths]
            entries = np.empty(part.shape[:2], dtype=ENTRY)
            entries["key"] = part
            entries["document"] = np.arange(start, start + len(part))[:, None]
            entries = entries.reshape(-1)
            place = entries["key"][:, 0] % np.uint64(len(files))
            for number, file in enumerate(files):
                file.write(entries[place == number].data if len(files) > 1 else entries.data)
            start += len(part)
    for path in paths if files else ():
        yield np.fromfile(path, dtype=ENTRY)
        path.unlink()


def _root(parent: np.ndarray, document: int) -> int:
    while parent[document] != document:
        parent[document] = parent[parent[document]]
        document = int(parent[document])
    return document
