"""Which documents of a whole corpus are the first of their kind: equal ones by hash, similar ones by MinHash bands.

Columns are read part by part and compared slice by slice, so that memory does not grow with the corpus but for a
number of eight bytes a document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

SLICE_DOCUMENTS = 1 << 23

Column = Callable[[], Iterator[np.ndarray]]  # the parts of a column, in order


def first_of_equal(hashes: Column, documents: int) -> np.ndarray:
    """bool [documents]: true for the first document of each hash; parts of uint64 [n, 2]."""
    first = np.ones(documents, dtype=bool)
    for numbers, values in _slices(hashes, documents):
        order = np.lexsort((numbers, values[:, 1], values[:, 0]))
        ordered = values[order]
        first[numbers[order[1:]]] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return first


def first_of_similar(bands: list[Column], documents: int) -> np.ndarray:
    """bool [documents]: true for documents that no earlier one meets in a band, directly or by way of others."""
    parent = np.arange(documents, dtype=np.int64)
    for band in bands:
        for numbers, values in _slices(band, documents):
            order = np.argsort(values, kind="stable")
            same = np.flatnonzero(values[order[1:]] == values[order[:-1]])
            for a, b in zip(numbers[order[same]].tolist(), numbers[order[same + 1]].tolist(), strict=True):
                a, b = _root(parent, a), _root(parent, b)
                parent[max(a, b)] = min(a, b)
    return parent == np.arange(documents)


def _slices(column: Column, documents: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields document numbers and values, all documents of equal value in the same slice."""
    slices = np.uint64(max(-(-documents // SLICE_DOCUMENTS), 1))
    for number in range(int(slices)):
        numbers, values, start = [], [], 0
        for part in column():
            mine = np.flatnonzero((part if part.ndim == 1 else part[:, 0]) % slices == number)
            numbers.append(mine + start)
            values.append(part[mine])
            start += len(part)
        yield np.concatenate(numbers), np.concatenate(values)


def _root(parent: np.ndarray, document: int) -> int:
    while parent[document] != document:
        parent[document] = parent[parent[document]]
        document = int(parent[document])
    return document
