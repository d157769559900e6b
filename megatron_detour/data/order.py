"""Which document comes when, and which corpus: pure functions of a seed and a number, without an index in memory."""

from __future__ import annotations

from fractions import Fraction
from math import lcm

import numpy as np

ROUNDS = 6
FINEST = 10_000  # mixtures are exact in steps of 1 / FINEST


def permute(numbers: np.ndarray, size: int, key: int) -> np.ndarray:
    """Maps `numbers`, int64 [n] below `size`, through the permutation of range(size) that `key` names.

    A Feistel network over the next even power of two, walked until it lands below `size` (cycle walking; Black and
    Rogaway, Ciphers with Arbitrary Finite Domains, 2002): no table, any number at once, the same on every machine.
    """
    half = max((size - 1).bit_length() + 1, 2) // 2
    result = numbers.astype(np.uint64)
    outside = np.ones(len(result), dtype=bool)
    while outside.any():
        result[outside] = _feistel(result[outside], half, key)
        outside = result >= size
    return result.astype(np.int64)


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

    def locate(self, sequence: int) -> tuple[int, int]:
        """The corpus that sequence number `sequence` comes from, and how many came from it before."""
        rounds, place = divmod(sequence, self.cycle)
        corpus = int(self._corpus[place])
        return corpus, rounds * int(self.counts[corpus]) + int(self._rank[place])


def _feistel(numbers: np.ndarray, half: int, key: int) -> np.ndarray:
    low_mask = np.uint64((1 << half) - 1)
    left, right = numbers >> np.uint64(half), numbers & low_mask
    for turn in range(ROUNDS):
        left, right = right, left ^ (_mix(right, key, turn) & low_mask)
    return (left << np.uint64(half)) | right


def _mix(values: np.ndarray, key: int, turn: int) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea and Flood, 2014) over value, key and round."""
    # Keys are longer than 64 bits: what is above them must count as well.
    salt = key * 0x9E3779B97F4A7C15 + (key >> 64) * 0xA24BAED4963EE407 + (turn + 1) * 0xD1B54A32D192ED03
    salt &= 0xFFFFFFFFFFFFFFFF
    x = values + np.uint64(salt)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _whole(weights: list[float]) -> np.ndarray:
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    cycle = lcm(*(share.denominator for share in shares))
    if cycle <= FINEST:
        return np.array([int(share * cycle) for share in shares])
    counts = [max(int(share * FINEST), 1) for share in shares]
    counts[max(range(len(counts)), key=counts.__getitem__)] += FINEST - sum(counts)
    return np.array(counts)


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
