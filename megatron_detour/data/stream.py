"""A corpus as an endless, randomly accessible stream of documents in random order.

Documents longer than a sequence are cut into pieces of one sequence and a remainder. A training step takes the pieces
that begin in its range of the stream: nothing is padded, every token occurs once per epoch, and a run's position in its
data is a number of tokens. The stream depends only on (seed, epoch).

The order is a permutation of the corpus, divided into windows of documents. The pieces of a window are shuffled once
more, so that the pieces of a long document do not follow each other.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from megatron_detour.data.indexed import IndexedCorpus
from megatron_detour.data.order import inverse_permute, permute
from megatron_detour.data.window_cache import WindowCache
from megatron_detour.errors import DetourError

WINDOW_DOCUMENTS, WINDOW_TOKENS = 1 << 17, 1 << 26  # maximum size of a window
KEPT = 2  # windows, and tables of an epoch's windows, in memory
CHUNK = 1 << 18  # documents counted at a time


@dataclass(frozen=True)
class Pieces:
    """Documents or pieces of long ones, in the order of the stream. All arrays are int64 [pieces]."""

    documents: np.ndarray
    starts: np.ndarray  # the first token within the document
    lengths: np.ndarray  # in tokens
    places: np.ndarray  # byte offset of the first token in the corpus's .bin
    offsets: np.ndarray  # of the first token in the stream, in tokens

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, which: slice | np.ndarray) -> Pieces:
        return Pieces(*(getattr(self, field.name)[which] for field in fields(self)))


class DocumentStream:
    """The stream of one corpus. Raises DetourError for a corpus without tokens."""

    def __init__(
        self, corpus: IndexedCorpus, sequence_length: int, seed: int, cache: WindowCache | None = None
    ) -> None:
        if not corpus.token_count:
            raise DetourError(f"{corpus.prefix}: the corpus has no tokens; rebuild it from non-empty text")
        self.corpus, self.sequence_length, self.seed, self.cache = corpus, sequence_length, seed, cache
        size = len(corpus)
        windows = max(-(-size // WINDOW_DOCUMENTS), -(-corpus.token_count // WINDOW_TOKENS))
        self.window_size = -(-size // windows)  # documents; the last window may be smaller
        self.windows = -(-size // self.window_size)  # per epoch
        self._ends: dict[int, np.ndarray] = {}
        self._kept: dict[tuple[int, int], Pieces] = {}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_kept": {}}

    def between(self, start: int, stop: int) -> Pieces:
        """Return the pieces whose first token is in [start, stop) of the stream."""
        tokens, parts = self.corpus.token_count, []
        while True:
            epoch, inside = divmod(start, tokens)
            ends = _cached(self._ends, epoch, self._window_ends)
            number = int(ends.searchsorted(inside, side="right"))
            window = _cached(self._kept, (epoch, number), self._window)
            parts.append(window[slice(*window.offsets.searchsorted([start, stop]))])
            start = epoch * tokens + int(ends[number])
            if start >= stop:
                break
        names = [field.name for field in fields(Pieces)]
        return Pieces(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def _window(self, at: tuple[int, int]) -> Pieces:
        epoch, number = at
        size, key = len(self.corpus), _key(self.seed, epoch)
        order = np.arange(number * self.window_size, min((number + 1) * self.window_size, size))
        documents = permute(order, size, key)
        lengths, places = self.corpus.locate(documents)
        pieces = self._cut(documents, lengths, places)
        pieces = pieces[permute(np.arange(len(pieces)), len(pieces), key + number + 1)]
        before, end = (int(self._ends[epoch][i]) if i >= 0 else 0 for i in (number - 1, number))
        if int(pieces.lengths.sum()) != end - before:
            raise self.corpus.mismatch()
        pieces.offsets[:] = epoch * self.corpus.token_count + before
        pieces.offsets[1:] += np.cumsum(pieces.lengths[:-1])
        return pieces

    def _cut(self, documents: np.ndarray, lengths: np.ndarray, places: np.ndarray) -> Pieces:
        counts = -(-lengths // self.sequence_length)
        before = np.repeat(np.cumsum(counts) - counts, counts)
        starts = (np.arange(len(before)) - before) * self.sequence_length
        documents, lengths, places = (np.repeat(array, counts) for array in (documents, lengths, places))
        lengths = np.minimum(lengths - starts, self.sequence_length)
        return Pieces(
            documents, starts, lengths, places + starts * self.corpus.dtype.itemsize, offsets=np.zeros_like(starts)
        )

    def _window_ends(self, epoch: int) -> np.ndarray:
        """Return the cumulative tokens of the epoch at the end of each window, int64 [windows]."""
        key = (self.seed, epoch, self.window_size)
        counts = self.cache.read(key, self.windows) if self.cache else None
        if counts is None:
            counts = self.count(epoch)
            if self.cache:
                self.cache.write(key, counts)
        return np.cumsum(counts)

    def count(self, epoch: int) -> np.ndarray:
        """Return the tokens of each window, int64 [windows].

        The index is read sequentially and each length added to its document's window, as reading window by window
        would access the index at random and need it in memory.
        """
        size, counts = len(self.corpus), np.zeros(self.windows, dtype=np.int64)
        if self.windows == 1:
            counts[0] = self.corpus.token_count
            return counts
        for begin in range(0, size, CHUNK):
            lengths = self.corpus.read_lengths(begin, min(begin + CHUNK, size))
            places = inverse_permute(np.arange(begin, begin + len(lengths)), size, _key(self.seed, epoch))
            # Sums of integers far below 2**53 are exact in float64.
            counts += np.bincount(places // self.window_size, lengths, self.windows).astype(np.int64)
        return counts


def _cached(kept: dict, key, compute):
    """Return `compute(key)`, keeping the KEPT most recently used values."""
    kept[key] = value = kept.pop(key) if key in kept else compute(key)
    if len(kept) > KEPT:
        del kept[next(iter(kept))]
    return value


def _key(seed: int, epoch: int) -> int:
    return (seed << 40) + (epoch << 24)
