"""Documents into packs of exactly `sequence_length` positions: best fit decreasing inside windows of the order.

A document is whole unless it is longer than a pack; then it is cut into pieces, and no token is lost. What a window
holds and how it is packed follows from (seed, epoch, window) alone. Epochs never end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from megatron_detour.data.counts import CountsFile
from megatron_detour.data.indexed import IndexedCorpus
from megatron_detour.data.order import permute, place_of

WINDOW = 1 << 17  # pieces packed together, about: the more, the less padding and the fewer windows to count
NEAR = 16  # windows ahead that are packed one after the other; for more, all of an epoch are counted
KEPT = 2  # packed windows in memory
CHUNK = 1 << 18  # documents counted at once
CELLS = 1 << 23  # of the table of lengths by window that counting fills in one reading of the index


@dataclass(frozen=True)
class Packs:
    """Pieces of documents pack by pack: pack k holds those from bounds[k] to bounds[k + 1]. All arrays are int64."""

    documents: np.ndarray  # [pieces]
    starts: np.ndarray  # [pieces], the first token within the document
    lengths: np.ndarray  # [pieces], in tokens
    places: np.ndarray  # [pieces], the first token in the corpus's .bin, in bytes
    bounds: np.ndarray  # [packs + 1]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def chosen(self, numbers: np.ndarray) -> Packs:
        """The packs with these numbers, int64 [n], in this order."""
        first, counts = self.bounds[numbers], self.bounds[numbers + 1] - self.bounds[numbers]
        bounds = np.concatenate([[0], np.cumsum(counts)])
        pieces = np.arange(bounds[-1]) + np.repeat(first - bounds[:-1], counts)
        arrays = (self.documents, self.starts, self.lengths, self.places)
        return Packs(*(array[pieces] for array in arrays), bounds)


class PackedCorpus:
    """The endless sequence of packs of a corpus, any of them at any time.

    To find pack k takes the pack counts of the windows before it, not their packs. Near windows are packed anyway; a
    whole epoch's counts take one reading of the index, and `counts_file` keeps them for the next process.
    """

    def __init__(
        self, corpus: IndexedCorpus, sequence_length: int, seed: int, counts_file: CountsFile | None = None
    ) -> None:
        self.corpus, self.sequence_length, self.seed, self.counts_file = corpus, sequence_length, seed, counts_file
        pieces = len(corpus) + corpus.token_count // sequence_length  # at most
        self.window_size = -(-len(corpus) // -(-pieces // WINDOW))  # documents, all windows alike but for the last
        self.windows_per_epoch = -(-len(corpus) // self.window_size)
        self._first_pack = [0]  # of each window so far, and one past the last
        self._kept: dict[int, Packs] = {}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_kept": {}}

    def packs(self, numbers: np.ndarray) -> Packs:
        """The packs with these numbers, int64 [n], in this order; the pieces of each fill at most a sequence."""
        self._reach(int(numbers.max()))
        windows = np.searchsorted(self._first_pack, numbers, side="right") - 1
        runs = [0, *(np.flatnonzero(np.diff(windows)) + 1).tolist(), len(numbers)]
        parts = []
        for begin, end in pairwise(runs):
            window = int(windows[begin])
            parts.append(self.window(window).chosen(numbers[begin:end] - self._first_pack[window]))
        return parts[0] if len(parts) == 1 else _joined(parts)

    def window(self, number: int) -> Packs:
        """All packs of a window; windows are numbered through the epochs."""
        packs = self._kept.pop(number, None) or self._pack(number)
        self._kept[number] = packs  # the last to be dropped
        if len(self._kept) > KEPT:
            del self._kept[next(iter(self._kept))]
        return packs

    def count_epoch(self, epoch: int) -> list[int]:
        """How many packs each window of an epoch has, from one reading of the index for every CELLS of its table."""
        together = max(CELLS // (self.sequence_length + 1), 1)
        groups = range(0, self.windows_per_epoch, together)
        return [
            count
            for first in groups
            for count in self._count_windows(epoch, first, min(first + together, self.windows_per_epoch))
        ]

    def _reach(self, pack: int) -> None:
        """Counts windows until the one that holds `pack` is among them."""
        packs_per_window = self.corpus.token_count / self.sequence_length / self.windows_per_epoch
        while pack >= self._first_pack[-1]:
            window = len(self._first_pack) - 1
            if pack - self._first_pack[-1] > NEAR * packs_per_window:
                counts = self._epoch_counts(window // self.windows_per_epoch)[window % self.windows_per_epoch :]
            else:
                counts = [len(self.window(window))]
            self._first_pack += list(accumulate(counts, initial=self._first_pack[-1]))[1:]

    def _epoch_counts(self, epoch: int) -> list[int]:
        if self.counts_file is None:
            return self.count_epoch(epoch)
        facts = (self.sequence_length, self.seed, epoch, self.window_size)
        counts = self.counts_file.read(facts, self.windows_per_epoch)
        if counts is None:
            counts = self.count_epoch(epoch)
            self.counts_file.write(facts, counts)
        return counts

    def _count_windows(self, epoch: int, first: int, last: int) -> list[int]:
        """Pack counts of the windows from `first` to before `last`.

        The index is read from end to end, and each length goes to its document's window: a window's documents lie
        everywhere in the index, which would have to be in memory.
        """
        size, width = len(self.corpus), self.sequence_length + 1
        table = np.zeros((last - first) * width, dtype=np.int32)
        full = np.zeros(last - first, dtype=np.int64)
        for begin in range(0, size, CHUNK):
            lengths = self.corpus.read_lengths(begin, min(begin + CHUNK, size))
            places = place_of(np.arange(begin, begin + len(lengths)), size, _key(self.seed, epoch))
            windows = places // self.window_size - first
            here = (windows >= 0) & (windows < last - first)
            if not here.all():
                lengths, windows = lengths[here], windows[here]
            wholes, tails = np.divmod(lengths, self.sequence_length)
            np.add.at(table, windows * width + tails, np.int32(1))
            long = np.flatnonzero(wholes)
            np.add.at(full, windows[long], wholes[long].astype(np.int64))
        rows = table.reshape(-1, width)
        return [int(full[i]) + _count_packs(row, self.sequence_length) for i, row in enumerate(rows)]

    def _pack(self, number: int) -> Packs:
        epoch, window = divmod(number, self.windows_per_epoch)
        size, key = len(self.corpus), _key(self.seed, epoch)
        order = np.arange(window * self.window_size, min((window + 1) * self.window_size, size))
        documents = permute(order, size, key)
        lengths, places = self.corpus.find(documents)
        documents, starts, lengths, places = self._cut(documents, lengths, places)
        pieces, bounds = best_fit_decreasing(lengths, self.sequence_length)
        # Best fit leaves the longest documents first; the order inside a window is shuffled back.
        shuffled = permute(np.arange(len(bounds) - 1), len(bounds) - 1, key + window + 1)
        packs = Packs(documents[pieces], starts[pieces], lengths[pieces], places[pieces], bounds)
        return packs.chosen(shuffled)

    def _cut(self, documents: np.ndarray, lengths: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, ...]:
        """Documents, starts, lengths and places, int64 [pieces], of documents of at most a sequence each."""
        counts = -(-lengths // self.sequence_length)
        before = np.repeat(np.cumsum(counts) - counts, counts)
        starts = (np.arange(len(before)) - before) * self.sequence_length
        documents, lengths, places = (np.repeat(array, counts) for array in (documents, lengths, places))
        lengths = np.minimum(lengths - starts, self.sequence_length)
        return documents, starts, lengths, places + starts * self.corpus.dtype.itemsize


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Packs pieces, longest first, each into the fullest pack that has room for it.

    lengths: int64 [pieces], from 1 to `capacity`. Returns (pieces, bounds): the numbers of the pieces pack by pack,
    int64 [pieces], and where in them each pack begins, int64 [packs + 1].
    """
    order = np.argsort(-lengths, kind="stable")
    pack_of = np.empty(len(lengths), dtype=np.int64)  # of the pieces in that order
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    opened = placed = 0
    for length, room, packs, each in _moves(np.bincount(lengths, minlength=capacity + 1), capacity):
        if room == capacity:
            moved = list(range(opened, opened + packs))
            opened += packs
        else:
            moved = with_room[room][-packs:]
            del with_room[room][-packs:]
        with_room[room - each * length] += moved
        pack_of[placed : placed + packs * each] = moved if each == 1 else np.repeat(moved, each)
        placed += packs * each
    by_pack = np.argsort(pack_of, kind="stable")
    bounds = np.concatenate([[0], np.cumsum(np.bincount(pack_of, minlength=opened))])
    return order[by_pack], bounds


def _count_packs(histogram: np.ndarray, capacity: int) -> int:
    return sum(packs for _, room, packs, _ in _moves(histogram, capacity) if room == capacity)


def _moves(histogram: np.ndarray, capacity: int) -> Iterator[tuple[int, int, int, int]]:
    """Best fit decreasing by numbers alone, as pieces of one length are alike, and packs with the same room.

    histogram: int [capacity + 1], pieces by length. Yields (length, room, packs, each): so many packs with this room,
    new ones where that is the capacity, take `each` pieces of this length.
    """
    packs_with = [0] * capacity + [int(histogram[1:].sum())]  # by room; there are never more packs than pieces
    nonempty = 1 << capacity  # a bit for each room that some pack has: the search for a pack is one shift
    lengths = np.flatnonzero(histogram[1:])[::-1] + 1
    for length, left in zip(lengths.tolist(), histogram[lengths].tolist(), strict=True):
        while left:
            fitting = nonempty >> length
            room = length + (fitting & -fitting).bit_length() - 1
            # A pack that took one piece is the fullest for the next, while it has room.
            each = min(room // length, left)
            packs = min(packs_with[room], left // each)
            yield length, room, packs, each
            left -= packs * each
            packs_with[room] -= packs
            if not packs_with[room]:
                nonempty ^= 1 << room
            rest = room - each * length
            packs_with[rest] += packs
            nonempty |= 1 << rest


def _joined(parts: list[Packs]) -> Packs:
    names = ("documents", "starts", "lengths", "places")
    counts = np.concatenate([np.diff(part.bounds) for part in parts])
    arrays = (np.concatenate([getattr(part, name) for part in parts]) for name in names)
    return Packs(*arrays, np.concatenate([[0], np.cumsum(counts)]))


def _key(seed: int, epoch: int) -> int:
    return (seed << 40) + (epoch << 24)
