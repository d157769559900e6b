"""Packing: every token once an epoch, nothing cut that fits, and pack k whatever was asked before."""

from __future__ import annotations

from itertools import count

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_detour.data import pack
from megatron_detour.data.pack import PackedCorpus, Piece, best_fit_decreasing


class Lengths:
    """All that packing asks of a corpus."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = np.array(lengths, dtype=np.int32)

    def __len__(self) -> int:
        return len(self.lengths)


CORPORA = st.lists(st.integers(1, 100), min_size=1, max_size=120).map(Lengths)
CAPACITIES = st.integers(1, 70)
SEEDS = st.integers(0, 2**31 - 1)
RANDOM = Lengths(np.random.default_rng(0).integers(1, 90, 400).tolist())


def epochs(packed: PackedCorpus, number: int) -> list[list[list[Piece]]]:
    """The packs of the first epochs, told apart by the tokens they hold."""
    whole, result, numbers = int(packed.corpus.lengths.sum()), [], count()
    for _ in range(number):
        packs, tokens = [], 0
        while tokens < whole:
            packs.append(packed.pack(next(numbers)))
            tokens += sum(piece.length for piece in packs[-1])
        result.append(packs)
    return result


@given(corpus=CORPORA, capacity=CAPACITIES, seed=SEEDS, window=st.sampled_from([1, 7, 64, 8_192]))
@settings(deadline=None, max_examples=100)
def test_every_token_once_an_epoch(corpus, capacity, seed, window):
    with_window, pack.WINDOW = pack.WINDOW, window
    try:
        both = epochs(PackedCorpus(corpus, capacity, seed), 2)
    finally:
        pack.WINDOW = with_window
    for packs in both:
        seen = [np.zeros(length, dtype=int) for length in corpus.lengths]
        for pieces in packs:
            assert 0 < sum(piece.length for piece in pieces) <= capacity
            for piece in pieces:
                assert 0 <= piece.start < piece.start + piece.length <= corpus.lengths[piece.document]
                seen[piece.document][piece.start : piece.start + piece.length] += 1
                if corpus.lengths[piece.document] <= capacity:
                    assert piece.length == corpus.lengths[piece.document]
        assert all((times == 1).all() for times in seen)
        pieces = sum(len(pieces) for pieces in packs)
        assert pieces == sum(-(-int(length) // capacity) for length in corpus.lengths)


@given(asked=st.lists(st.integers(0, 700), min_size=1, max_size=6), window=st.sampled_from([32, 8_192]))
@settings(deadline=None, max_examples=15)
def test_a_pack_does_not_depend_on_what_was_asked_before(asked, window):
    with_window, pack.WINDOW = pack.WINDOW, window
    try:
        packed = PackedCorpus(RANDOM, 128, 42)
        for number in asked:
            assert packed.pack(number) == PackedCorpus(RANDOM, 128, 42).pack(number)
    finally:
        pack.WINDOW = with_window


def test_epochs_differ():
    first, second, third = epochs(PackedCorpus(RANDOM, 128, 42), 3)
    assert first != second != third != first
    orders = [[piece.document for pieces in packs for piece in pieces] for packs in (first, second)]
    assert sorted(orders[0]) == sorted(orders[1])
    assert np.mean(np.array(orders[0]) == np.array(orders[1])) < 0.05


@given(seed=SEEDS, other=SEEDS)
@settings(deadline=None, max_examples=50)
def test_seeds_differ(seed, other):
    same = epochs(PackedCorpus(RANDOM, 128, seed), 1) == epochs(PackedCorpus(RANDOM, 128, other), 1)
    assert same == (seed == other)


def test_seeds_differ_in_their_high_bits():
    low, high = (epochs(PackedCorpus(RANDOM, 128, seed), 1) for seed in (42, 42 + (1 << 24)))
    assert low != high


def test_little_is_padding():
    packs = epochs(PackedCorpus(Lengths(np.random.default_rng(1).integers(1, 500, 4_000).tolist()), 1_024, 42), 1)[0]
    tokens = sum(piece.length for pieces in packs for piece in pieces)
    assert 1 - tokens / (len(packs) * 1_024) < 0.005


def test_best_fit_takes_the_fullest_pack_with_room():
    lengths = [6, 5, 4, 3, 3, 1]
    packs = best_fit_decreasing([Piece(i, 0, length) for i, length in enumerate(lengths)], 10)
    # 4 joins the 6 and fills it (the 5 has more room), 3 joins the 5, 3 opens a pack, 1 joins 5 + 3.
    assert [[piece.length for piece in pieces] for pieces in packs] == [[6, 4], [5, 3, 1], [3]]


def test_packs_are_not_sorted_by_length():
    packs = epochs(PackedCorpus(RANDOM, 128, 42), 1)[0]
    longest = [max(piece.length for piece in pieces) for pieces in packs]
    assert abs(np.corrcoef(np.arange(len(longest)), longest)[0, 1]) < 0.3
