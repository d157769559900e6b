"""Packing: every token once an epoch, nothing cut that fits, and pack k whatever was asked before."""

from __future__ import annotations

import bisect
import pickle
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_detour.data import pack
from megatron_detour.data.pack import PackedCorpus, Packs, best_fit_decreasing


class Lengths:
    """All that packing asks of a corpus."""

    dtype = np.dtype(np.uint16)

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = np.array(lengths, dtype=np.int32)
        self.token_count = int(self.lengths.sum())

    def __len__(self) -> int:
        return len(self.lengths)

    def read_lengths(self, first: int, last: int) -> np.ndarray:
        return self.lengths[first:last]

    def find(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        places = 2 * (np.cumsum(self.lengths, dtype=np.int64) - self.lengths)
        return self.lengths[documents].astype(np.int64), places[documents]


CORPORA = st.lists(st.integers(1, 100), min_size=1, max_size=120).map(Lengths)
CAPACITIES = st.integers(1, 70)
SEEDS = st.integers(0, 2**31 - 1)
WINDOWS = st.sampled_from([1, 7, 64, 8_192])
RANDOM = Lengths(np.random.default_rng(0).integers(1, 90, 400).tolist())


@pytest.fixture
def window_of(monkeypatch):
    """Sets the window's size, also from within a property test."""
    return lambda pieces: monkeypatch.setattr(pack, "WINDOW", pieces)


def as_lists(packs: Packs) -> list[list[tuple[int, int, int]]]:
    """(document, start, length) of every piece, pack by pack."""
    pieces = list(zip(packs.documents.tolist(), packs.starts.tolist(), packs.lengths.tolist(), strict=True))
    return [pieces[begin:end] for begin, end in pairwise(packs.bounds.tolist())]


def epoch_of(packed: PackedCorpus, epoch: int = 0) -> list[list[tuple[int, int, int]]]:
    windows = range(epoch * packed.windows_per_epoch, (epoch + 1) * packed.windows_per_epoch)
    return [pieces for window in windows for pieces in as_lists(packed.window(window))]


@given(corpus=CORPORA, capacity=CAPACITIES, seed=SEEDS, window=WINDOWS)
@settings(deadline=None, max_examples=100)
def test_every_token_once_an_epoch(corpus, capacity, seed, window):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "WINDOW", window)
        packed = PackedCorpus(corpus, capacity, seed)
        both = epoch_of(packed, 0), epoch_of(packed, 1)
    for packs in both:
        seen = [np.zeros(length, dtype=int) for length in corpus.lengths]
        for pieces in packs:
            assert 0 < sum(length for _, _, length in pieces) <= capacity
            for document, start, length in pieces:
                assert 0 <= start < start + length <= corpus.lengths[document]
                seen[document][start : start + length] += 1
                if corpus.lengths[document] <= capacity:
                    assert length == corpus.lengths[document]
        assert all((times == 1).all() for times in seen)
        assert sum(len(pieces) for pieces in packs) == sum(-(-int(n) // capacity) for n in corpus.lengths)


@given(corpus=CORPORA, capacity=CAPACITIES, seed=SEEDS, window=WINDOWS, cells=st.sampled_from([1, 500, 1 << 23]))
@settings(deadline=None, max_examples=100)
def test_counts_are_what_packing_gives(corpus, capacity, seed, window, cells):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "WINDOW", window)
        patch.setattr(pack, "CELLS", cells)
        patch.setattr(pack, "CHUNK", 17)
        packed = PackedCorpus(corpus, capacity, seed)
        for epoch in (0, 3):
            first = epoch * packed.windows_per_epoch
            packs = [len(packed.window(first + window)) for window in range(packed.windows_per_epoch)]
            assert packed.count_epoch(epoch) == packs


def test_pieces_stand_where_their_documents_do():
    packs = PackedCorpus(RANDOM, 32, 42).window(0)
    _, places = RANDOM.find(packs.documents)
    assert packs.places.tolist() == (places + 2 * packs.starts).tolist()
    assert packs.starts.max() == 64


def test_epochs_differ():
    packed = PackedCorpus(RANDOM, 128, 42)
    first, second, third = (epoch_of(packed, epoch) for epoch in range(3))
    assert first != second != third != first
    orders = [[document for pieces in packs for document, _, _ in pieces] for packs in (first, second)]
    assert sorted(orders[0]) == sorted(orders[1])
    assert np.mean(np.array(orders[0]) == np.array(orders[1])) < 0.05


@given(seed=SEEDS, other=SEEDS)
@settings(deadline=None, max_examples=50)
def test_seeds_differ(seed, other):
    same = epoch_of(PackedCorpus(RANDOM, 128, seed)) == epoch_of(PackedCorpus(RANDOM, 128, other))
    assert same == (seed == other)


def test_seeds_differ_in_their_high_bits():
    low, high = (epoch_of(PackedCorpus(RANDOM, 128, seed)) for seed in (42, 42 + (1 << 24)))
    assert low != high


def test_windows_are_of_one_size(window_of):
    """A small last window would pack badly: the documents are shared out evenly."""
    window_of(90)
    packed = PackedCorpus(Lengths([5] * 100), 128, 42)
    assert (packed.windows_per_epoch, packed.window_size) == (2, 50)


def test_long_documents_make_windows_of_fewer(window_of):
    window_of(100)
    packed = PackedCorpus(Lengths([1_000] * 40), 10, 42)
    assert packed.window_size == 1
    window_of(1_010)
    assert PackedCorpus(Lengths([1_000] * 40), 10, 42).window_size == 10


@given(asked=st.lists(st.integers(0, 900), min_size=1, max_size=6), window=st.sampled_from([4, 32, 8_192]))
@settings(deadline=None, max_examples=25)
def test_it_is_the_one_that_counting_on_would_reach(asked, window):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "WINDOW", window)
        packed = PackedCorpus(RANDOM, 128, 42)
        in_order = [pieces for epoch in range(7) for pieces in epoch_of(packed, epoch)]
        assert len(in_order) > 900
        together = PackedCorpus(RANDOM, 128, 42).packs(np.array(asked))
        assert as_lists(together) == [in_order[number] for number in asked]
        for number in asked:  # by one reader that has been elsewhere
            assert as_lists(packed.packs(np.array([number]))) == [in_order[number]]


def test_a_far_one_is_found_without_packing_what_lies_before(window_of, monkeypatch):
    window_of(8)
    packed = PackedCorpus(RANDOM, 128, 42)
    in_order = [pieces for epoch in range(4) for pieces in epoch_of(packed, epoch)]
    number = len(in_order) - 3
    packs, far = [], PackedCorpus(RANDOM, 128, 42)
    monkeypatch.setattr(far, "_pack", lambda window: packs.append(window) or packed._pack(window))
    assert as_lists(far.packs(np.array([number]))) == [in_order[number]]
    assert len(packs) <= pack.NEAR + 2 < packed.windows_per_epoch


def test_a_copy_in_another_process_knows_the_same():
    packed = PackedCorpus(RANDOM, 128, 42)
    numbers = np.array([5, 500, 7])
    expected = as_lists(packed.packs(numbers))
    copy = pickle.loads(pickle.dumps(packed))
    assert as_lists(copy.packs(numbers)) == expected


def test_it_takes_the_fullest_pack_with_room():
    lengths = np.array([3, 5, 4, 6, 3, 1])
    pieces, bounds = best_fit_decreasing(lengths, 10)
    # 4 joins the 6 and fills it (the 5 has more room), 3 joins the 5, 3 opens a pack, 1 joins 5 + 3.
    assert [lengths[pieces[a:b]].tolist() for a, b in pairwise(bounds)] == [[6, 4], [5, 3, 1], [3]]
    assert sorted(pieces.tolist()) == list(range(6))


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=200), capacity=st.integers(30, 60))
@settings(deadline=None, max_examples=200)
def test_it_is_best_fit_decreasing_piece_by_piece(lengths, capacity):
    """All pieces of a length and all packs of a room at once, yet as if taken one after the other."""
    rooms, expected = [], []  # rooms: free space, ascending
    for length in sorted(lengths, reverse=True):
        fit = bisect.bisect_left(rooms, length)
        room = rooms.pop(fit) if fit < len(rooms) else capacity
        bisect.insort(rooms, room - length)
    pieces, bounds = best_fit_decreasing(np.array(lengths), capacity)
    expected = sorted(capacity - room for room in rooms)
    assert sorted(np.add.reduceat(np.array(lengths)[pieces], bounds[:-1]).tolist()) == expected
    assert sorted(pieces.tolist()) == list(range(len(lengths)))


@pytest.mark.parametrize("capacity", [1_024, 8_192])
def test_little_is_padding(capacity):
    lengths = np.random.default_rng(1).lognormal(5.7, 0.8, 20_000).astype(int) + 2
    packed = PackedCorpus(Lengths(lengths.tolist()), capacity, 42)
    assert 1 - packed.corpus.token_count / (sum(packed.count_epoch(0)) * capacity) < 0.003


def test_packs_are_not_sorted_by_length():
    packs = epoch_of(PackedCorpus(RANDOM, 128, 42))
    longest = [max(length for _, _, length in pieces) for pieces in packs]
    assert abs(np.corrcoef(np.arange(len(longest)), longest)[0, 1]) < 0.3
