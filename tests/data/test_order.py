"""The order: a bijection without a table, and a mixture that keeps to its shares over every prefix."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_detour.data import order
from megatron_detour.data.order import FINEST, Mixture, permute, place_of

KEYS = st.integers(0, 2**72)
WEIGHTS = st.lists(st.floats(1e-3, 1e3) | st.integers(1, 20).map(float), min_size=1, max_size=6)


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
    assert place_of(permute(asked, size, key), size, key).tolist() == asked.tolist()
    assert permute(place_of(asked, size, key), size, key).tolist() == asked.tolist()


def test_rounds_from_tables_are_rounds_computed(monkeypatch):
    numbers = np.arange(0, 10**6, 997)
    from_tables = permute(numbers, 10**6, 42 << 40)
    monkeypatch.setattr(order, "TABLES", 0)
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


def shares_of(weights: list[float], mixture: Mixture) -> list[Fraction]:
    """The shares the mixture deals: the weights', rounded to 1 / FINEST where they are awkward."""
    shares = [Fraction(int(count), mixture.cycle) for count in mixture.counts]
    total = sum(Fraction(str(weight)) for weight in weights)
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - Fraction(str(weight)) / total) <= Fraction(len(weights), FINEST)
    return shares


@given(weights=WEIGHTS)
@settings(deadline=None, max_examples=20)
def test_every_prefix_of_a_mixture_keeps_to_its_shares(weights):
    mixture = Mixture(weights)
    shares = shares_of(weights, mixture)
    assert mixture.cycle <= FINEST
    dealt = [0] * len(weights)
    corpora, ranks = mixture.locate(np.arange(mixture.cycle + 50))  # past the end of a cycle
    for number, (corpus, rank) in enumerate(zip(corpora.tolist(), ranks.tolist(), strict=True)):
        assert rank == dealt[corpus]
        dealt[corpus] += 1
        for count, share in zip(dealt, shares, strict=True):
            distance = count * share.denominator - (number + 1) * share.numerator
            assert abs(distance) < share.denominator
    assert sum(dealt) == mixture.cycle + 50


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ([1.0], [1]),
        ([0.6, 0.2, 0.2], [3, 1, 1]),
        ([0.7, 0.2, 0.06, 0.04], [35, 10, 3, 2]),
        ([3.0, 1.0], [3, 1]),
        ([0.1, 0.2], [1, 2]),
        ([1e-9, 1.0], [1, FINEST - 1]),
    ],
)
def test_counts_in_a_cycle(weights, counts):
    assert Mixture(weights).counts.tolist() == counts


def test_a_mixture_far_along():
    mixture = Mixture([0.6, 0.4])
    assert mixture.cycle == 5
    corpora, ranks = mixture.locate(np.arange(5))
    assert sorted(corpora.tolist()) == [0, 0, 0, 1, 1]
    far_corpora, far_ranks = mixture.locate(5 * 10**12 + np.arange(5))
    assert far_corpora.tolist() == corpora.tolist()
    ahead = np.array([3 * 10**12, 2 * 10**12])
    assert far_ranks.tolist() == (ranks + ahead[corpora]).tolist()


@given(weights=WEIGHTS, numbers=st.lists(st.integers(0, 10**12), min_size=1, max_size=20))
@settings(deadline=None, max_examples=20)
def test_a_mixture_is_the_same_one_by_one(weights, numbers):
    mixture = Mixture(weights)
    corpora, ranks = mixture.locate(np.array(numbers))
    alone = [mixture.locate(np.array([number])) for number in numbers]
    assert list(zip(corpora.tolist(), ranks.tolist(), strict=True)) == [(int(c[0]), int(r[0])) for c, r in alone]
