"""Which document comes when, and with which others: pure functions, without an index in memory."""

from __future__ import annotations

import heapq
from functools import lru_cache

import numpy as np

from megatron_detour.counter_rng import WORD, mix

ROUNDS = 6
TABLES = 1 << 16  # the largest half whose round functions are kept as tables


def permute(numbers: np.ndarray, size: int, key: int) -> np.ndarray:
    """Maps `numbers`, int64 [n] below `size`, through the permutation of range(size) that `key` names.

    A Feistel network over the next even power of two, walked until it lands below `size` (cycle walking; Black and
    Rogaway, Ciphers with Arbitrary Finite Domains, 2002): no table, any number at once, the same on every machine.
    """
    return _walk(numbers, size, key, backward=False)


def place_of(numbers: np.ndarray, size: int, key: int) -> np.ndarray:
    """The inverse of `permute`: at which places, int64 [n], it puts these numbers."""
    return _walk(numbers, size, key, backward=True)


def deal(lengths: np.ndarray, shares: int) -> list[np.ndarray]:
    """Shares documents out by length, int64 [documents]: the numbers of those in each share, ascending.

    The longest come first, each to the share that has least (Graham, Bounds on Multiprocessing Timing Anomalies, 1969):
    none has more than the mean and one document.
    """
    loads = [(0, share) for share in range(shares)]
    share_of = np.empty(len(lengths), dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    for document, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        load, share = loads[0]
        heapq.heapreplace(loads, (load + length, share))
        share_of[document] = share
    in_order = np.argsort(share_of, kind="stable")
    return np.split(in_order, np.searchsorted(share_of[in_order], np.arange(1, shares)))


def micro_batches_of(tokens: int, micro_tokens: int, rank: int, ranks: int) -> tuple[range, int]:
    """The numbers of a data-parallel rank's micro-batches of about `micro_tokens` each, and how many all ranks have."""
    each = -(-tokens // (ranks * micro_tokens))
    return range(rank * each, (rank + 1) * each), ranks * each


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
