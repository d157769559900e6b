"""The order: a bijection without a table, and shares of like size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_detour.data import order
from megatron_detour.data.order import balance, inverse_permute, permute, rank_micro_batches

KEYS = st.integers(0, 2**72)


@given(size=st.integers(1, 3_000), key=KEYS)
@settings(deadline=None, max_examples=100)
def test_permutation_is_a_bijection(size, key):
    permuted = permute(np.arange(size), size, key)
    assert permuted.dtype == np.int64
    assert np.array_equal(np.sort(permuted), np.arange(size))


@given(size=st.integers(1, 10**12), key=KEYS, numbers=st.lists(st.integers(0, 10**12), min_size=1, max_size=20))
@settings(deadline=None, max_examples=100)
def test_any_number_of_a_permutation_alone(size, key, numbers):
    asked = np.array(sorted({number % size for number in numbers}))
    together = permute(asked, size, key)
    assert ((together >= 0) & (together < size)).all()
    assert len(set(together.tolist())) == len(asked)
    assert [int(permute(asked[i : i + 1], size, key)[0]) for i in range(len(asked))] == together.tolist()


@given(size=st.integers(1, 10**12), key=KEYS, numbers=st.lists(st.integers(0, 10**12), min_size=1, max_size=20))
@settings(deadline=None, max_examples=100)
def test_places_are_the_inverse(size, key, numbers):
    asked = np.array(numbers) % size
    assert inverse_permute(permute(asked, size, key), size, key).tolist() == asked.tolist()
    assert permute(inverse_permute(asked, size, key), size, key).tolist() == asked.tolist()


def test_rounds_from_tables_are_rounds_computed(monkeypatch):
    numbers = np.arange(0, 10**6, 997)
    from_tables = permute(numbers, 10**6, 42 << 40)
    monkeypatch.setattr(order, "MAX_TABLE", 0)
    assert permute(numbers, 10**6, 42 << 40).tolist() == from_tables.tolist()


@given(key=st.integers(0, 2**71), bit=st.integers(0, 70))
@settings(deadline=None, max_examples=100)
def test_every_bit_of_the_key_counts(key, bit):
    numbers = np.arange(1_000)
    assert not np.array_equal(permute(numbers, 1_000, key), permute(numbers, 1_000, key ^ (1 << bit)))


def test_the_order_is_the_same_on_every_machine():
    """Runs resume by it: a change here is a change of every run's data."""
    assert permute(np.arange(10), 10, 42 << 40).tolist() == [4, 5, 6, 2, 0, 1, 3, 9, 7, 8]


def test_a_permutation_mixes():
    """No number keeps near its place, and neighbours part: within four standard deviations of chance."""
    size = 100_000
    permuted = permute(np.arange(size), size, 42 << 40)
    correlation = np.corrcoef(np.arange(size), permuted)[0, 1]
    assert abs(correlation) < 4 / size**0.5
    neighbours = np.corrcoef(permuted[:-1], permuted[1:])[0, 1]
    assert abs(neighbours) < 4 / size**0.5
    assert (permuted == np.arange(size)).sum() < 8  # a random permutation has one fixed point on average


@given(lengths=st.lists(st.integers(1, 100), max_size=200), shares=st.integers(1, 12))
@settings(deadline=None, max_examples=100)
def test_shares_are_of_like_size(lengths, shares):
    dealt = balance(np.array(lengths, dtype=np.int64), shares)
    assert len(dealt) == shares
    assert sorted(np.concatenate(dealt).tolist()) == list(range(len(lengths)))
    assert all((np.diff(share) > 0).all() for share in dealt)
    loads = [sum(lengths[document] for document in share) for share in dealt]
    assert max(loads) - min(loads) <= max(lengths, default=0)
    assert max(loads) <= sum(lengths) / shares + max(lengths, default=0)


@pytest.mark.parametrize(
    ("tokens", "micro_tokens", "ranks", "expected"),
    [(64, 8, 2, 4), (64, 64, 1, 1), (64, 8, 3, 3), (65, 8, 2, 5), (8, 64, 4, 1)],
)
def test_micro_batches_of_ranks(tokens, micro_tokens, ranks, expected):
    found = [rank_micro_batches(tokens, micro_tokens, rank, ranks) for rank in range(ranks)]
    assert {of for _, of in found} == {expected * ranks}
    assert [number for numbers, _ in found for number in numbers] == list(range(expected * ranks))
