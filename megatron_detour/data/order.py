"""Which document comes when, and which corpus: pure functions of a seed and a number, without an index in memory."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from math import lcm

import numpy as np

from megatron_detour.data.splitmix import WORD, mix

ROUNDS = 6
TABLES = 1 << 16  # the largest half whose round functions are kept as tables
FINEST = 10_000  # mixtures are exact in steps of 1 / FINEST


def permute(numbers: np.ndarray, size: int, key: int) -> np.ndarray:
    """Maps `numbers`, int64 [n] below `size`, through the permutation of range(size) that `key` names.

    A Feistel network over the next even power of two, walked until it lands below `size` (cycle walking; Black and
    Rogaway, Ciphers with Arbitrary Finite Domains, 2002): no table, any number at once, the same on every machine.
    """
    return _walk(numbers, size, key, backward=False)


def place_of(numbers: np.ndarray, size: int, key: int) -> np.ndarray:
    """The inverse of `permute`: at which places, int64 [n], it puts these numbers."""
    return _walk(numbers, size, key, backward=True)


class Mixture:
    """Deals sequences to corpora by weight: over any prefix each corpus is within one sequence of its share.

    The weights become whole numbers of sequences in a cycle, dealt by earliest deadline (Steiner and Yeomans, Level
    Schedules for Mixed-Model, Just-in-Time Processes, 1993), so `locate` needs one cycle's table and no state.
    """

    def __init__(self, weights: list[float]) -> None:
        self.counts = _whole(weights)
        self.cycle = int(self.counts.sum())
        self._corpus = _deal(self.counts)
        self._rank = np.zeros(self.cycle, dtype=np.int64)
        for corpus in range(len(weights)):
            mine = self._corpus == corpus
            self._rank[mine] = np.arange(mine.sum())

    def locate(self, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of sequences by number, int64 [n]: each one's corpus and how many came from that corpus before it."""
        rounds, place = np.divmod(sequences, self.cycle)
        corpus = self._corpus[place].astype(np.int64)
        return corpus, rounds * self.counts[corpus] + self._rank[place]

    def before(self, sequence: int) -> np.ndarray:
        """How many of the sequences before this number fall to each corpus, int64 [corpora]."""
        rounds, place = divmod(sequence, self.cycle)
        return rounds * self.counts + np.bincount(self._corpus[:place], minlength=len(self.counts))


def _walk(numbers: np.ndarray, size: int, key: int, backward: bool) -> np.ndarray:
    half = max((size - 1).bit_length() + 1, 2) // 2
    turns = range(ROUNDS - 1, -1, -1) if backward else range(ROUNDS)
    result = _feistel(numbers, half, key, turns)
    outside = np.flatnonzero(result >= size)
    while len(outside):
        again = _feistel(result[outside], half, key, turns)
        result[outside] = again
        outside = outside[again >= size]
    return result


def _feistel(numbers: np.ndarray, half: int, key: int, turns: range) -> np.ndarray:
    left, right = numbers >> half, numbers & ((1 << half) - 1)
    backward = turns.step < 0
    if backward:
        left, right = right, left
    for turn in turns:
        left, right = right, left ^ _round(right, half, key, turn)
    if backward:
        left, right = right, left
    return (left << half) | right


def _round(values: np.ndarray, half: int, key: int, turn: int) -> np.ndarray:
    """The round function: `half` bits of value, key and round mixed."""
    if 1 << half <= TABLES:
        return _table(half, key, turn).take(values)  # many times as fast, and all in the first caches
    return _compute_round(values, half, key, turn)


@lru_cache(maxsize=4 * ROUNDS)
def _table(half: int, key: int, turn: int) -> np.ndarray:
    return _compute_round(np.arange(1 << half), half, key, turn)


def _compute_round(values: np.ndarray, half: int, key: int, turn: int) -> np.ndarray:
    # Keys are longer than 64 bits: what is above them must count as well.
    salt = key * 0x9E3779B97F4A7C15 + (key >> 64) * 0xA24BAED4963EE407 + (turn + 1) * 0xD1B54A32D192ED03
    return (mix(values.astype(np.uint64) + np.uint64(salt & WORD)) & np.uint64((1 << half) - 1)).astype(np.int64)


def _whole(weights: list[float]) -> np.ndarray:
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    cycle = lcm(*(share.denominator for share in shares))
    if cycle <= FINEST:
        return np.array([int(share * cycle) for share in shares], dtype=np.int64)
    counts = [max(int(share * FINEST), 1) for share in shares]
    remainders = [share * FINEST - count for share, count in zip(shares, counts, strict=True)]
    while sum(counts) != FINEST:  # to those that are furthest from their share
        step = 1 if sum(counts) < FINEST else -1
        chosen = max(range(len(counts)), key=lambda i: (remainders[i] * step, counts[i]))
        counts[chosen] += step
        remainders[chosen] -= step
    return np.array(counts, dtype=np.int64)


def _deal(counts: np.ndarray) -> np.ndarray:
    cycle = int(counts.sum())
    dealt = [0] * len(counts)
    table = np.empty(cycle, dtype=np.int16)
    for place in range(cycle):
        # Unit j of a corpus with n in a cycle of c may come from place floor(j c / n) on and must come before
        # ceil((j + 1) c / n).
        ready = [i for i, n in enumerate(counts) if dealt[i] < n and dealt[i] * cycle // int(n) <= place]
        chosen = min(ready, key=lambda i: -(-(dealt[i] + 1) * cycle // int(counts[i])))
        table[place] = chosen
        dealt[chosen] += 1
    return table
