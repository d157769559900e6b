"""The order of documents and their distribution over micro-batches: pure functions, without an index in memory."""

from __future__ import annotations

import heapq
from functools import lru_cache

import numpy as np

from megatron_detour.counter_rng import WORD, mix

ROUNDS = 6
MAX_TABLE = 1 << 16  # entries: larger round functions are computed, not tabulated


def permute(numbers: np.ndarray, size: int, key: int) -> np.ndarray:
    """Map `numbers`, int64 [n] below `size`, through the permutation of range(size) that `key` selects.

    A Feistel network over the next even power of two, iterated until the result is below `size` (cycle walking; Black
    and Rogaway, Ciphers with Arbitrary Finite Domains, 2002): no table is needed, and all machines agree.
    """
    return _walk(numbers, size, key, backward=False)


def inverse_permute(numbers: np.ndarray, size: int, key: int) -> np.ndarray:
    """Return the arguments, int64 [n], that `permute` maps to `numbers`."""
    return _walk(numbers, size, key, backward=True)


def balance(lengths: np.ndarray, bins: int) -> list[np.ndarray]:
    """Distribute documents of these lengths, int64 [documents], over bins; return each bin's indices, ascending.

    Longest first, each to the least loaded bin (Graham, Bounds on Multiprocessing Timing Anomalies, 1969): no bin
    exceeds the mean by more than one document.
    """
    loads = [(0, number) for number in range(bins)]
    bin_of = np.empty(len(lengths), dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    for document, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        load, number = loads[0]
        heapq.heapreplace(loads, (load + length, number))
        bin_of[document] = number
    in_order = np.argsort(bin_of, kind="stable")
    return np.split(in_order, np.searchsorted(bin_of[in_order], np.arange(1, bins)))


def rank_micro_batches(tokens: int, micro_tokens: int, rank: int, ranks: int) -> tuple[range, int]:
    """Return the numbers of a data-parallel rank's micro-batches of about `micro_tokens`, and the total number."""
    per_rank = -(-tokens // (ranks * micro_tokens))
    return range(rank * per_rank, (rank + 1) * per_rank), ranks * per_rank


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
    """The round function: `half` bits that mix value, key and round number."""
    if 1 << half <= MAX_TABLE:
        return _table(half, key, turn).take(values)  # many times as fast: it fits into the L1 and L2 caches
    return _compute_round(values, half, key, turn)


@lru_cache(maxsize=4 * ROUNDS)
def _table(half: int, key: int, turn: int) -> np.ndarray:
    return _compute_round(np.arange(1 << half), half, key, turn)


def _compute_round(values: np.ndarray, half: int, key: int, turn: int) -> np.ndarray:
    # Keys exceed 64 bits: the bits above must count as well.
    salt = key * 0x9E3779B97F4A7C15 + (key >> 64) * 0xA24BAED4963EE407 + (turn + 1) * 0xD1B54A32D192ED03
    return (mix(values.astype(np.uint64) + np.uint64(salt & WORD)) & np.uint64((1 << half) - 1)).astype(np.int64)
