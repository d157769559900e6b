"""Documents into packs of exactly `sequence_length` positions: best fit decreasing inside windows of the order.

A document is whole unless it is longer than a pack; then it is cut into pieces, and no token is lost. What a window
holds and how it is packed follows from (seed, epoch, window) alone. Epochs never end.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_detour.data.indexed import IndexedCorpus
from megatron_detour.data.order import permute

WINDOW = 8_192  # documents packed together: padding stays near 0.1%, and a window is packed in milliseconds


@dataclass(frozen=True)
class Piece:
    """A stretch of a document: `length` tokens from `start` on."""

    document: int
    start: int
    length: int


class PackedCorpus:
    """The endless sequence of packs of a corpus; `pack(k)` is the k-th, whatever was asked for before."""

    def __init__(self, corpus: IndexedCorpus, sequence_length: int, seed: int) -> None:
        self.corpus = corpus
        self.sequence_length = sequence_length
        self.seed = seed
        self.windows_per_epoch = -(-len(corpus) // WINDOW)
        self._first_pack = [0]  # of each window that has been packed so far
        self._window = lru_cache(maxsize=4)(self._pack_window)

    def pack(self, number: int) -> list[Piece]:
        """The pieces of pack `number`; their lengths sum to at most `sequence_length`."""
        while number >= self._first_pack[-1]:
            packs = self._window(len(self._first_pack) - 1)
            self._first_pack.append(self._first_pack[-1] + len(packs))
        window = bisect_right(self._first_pack, number) - 1
        return self._window(window)[number - self._first_pack[window]]

    def _pack_window(self, number: int) -> list[list[Piece]]:
        epoch, window = divmod(number, self.windows_per_epoch)
        size = len(self.corpus)
        places = np.arange(window * WINDOW, min((window + 1) * WINDOW, size))
        documents = permute(places, size, _key(self.seed, epoch))
        pieces = _cut(documents, self.corpus.lengths[documents], self.sequence_length)
        packs = best_fit_decreasing(pieces, self.sequence_length)
        # Best fit leaves the longest documents first; the order inside a window is shuffled back.
        shuffled = permute(np.arange(len(packs)), len(packs), _key(self.seed, epoch) + window + 1)
        return [packs[i] for i in shuffled]


def best_fit_decreasing(pieces: list[Piece], capacity: int) -> list[list[Piece]]:
    """Packs pieces, longest first, each into the fullest pack that has room for it.

    Packs wait in a list per free space; a bit per non-empty list makes the search one shift.
    """
    packs: list[list[Piece]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    nonempty = 0
    for piece in sorted(pieces, key=lambda p: -p.length):
        fitting = nonempty >> piece.length
        if fitting:
            room = piece.length + (fitting & -fitting).bit_length() - 1
            pack = with_room[room].pop()
            if not with_room[room]:
                nonempty &= ~(1 << room)
        else:
            room, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(piece)
        left = room - piece.length
        with_room[left].append(pack)
        nonempty |= 1 << left
    return packs


def _cut(documents: np.ndarray, lengths: np.ndarray, capacity: int) -> list[Piece]:
    return [
        Piece(document, start, min(capacity, length - start))
        for document, length in zip(documents.tolist(), lengths.tolist(), strict=True)
        for start in range(0, length, capacity)
    ]


def _key(seed: int, epoch: int) -> int:
    return (seed << 40) + (epoch << 24)
