"""Masking at its rates, of ordinary tokens only; causal labels inside documents only."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest

from megatron_detour.data.vocabulary import Vocabulary
from megatron_detour.objectives import IGNORE, CausalLM, MaskedLM, make

CLS, SEP, PAD, MASK, UNK, EXTRA = 3, 7, 11, 500, 999, 640
SPECIAL = (CLS, SEP, PAD, MASK, EXTRA, UNK)
VOCABULARY = Vocabulary(1_000, tuple(sorted(SPECIAL)), MASK, PAD, CLS, SEP, UNK, "")
BIG = 1_000_000


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    """Every id, special ones among them, a thousand times each."""
    return np.random.default_rng(0).permutation(np.arange(BIG) % 1_000)


def whole(tokens: np.ndarray) -> np.ndarray:
    return np.array([len(tokens)])


@pytest.mark.parametrize("rate", [0.15, 0.30])
def test_rates_of_masking(tokens, rate):
    inputs, labels = MaskedLM(VOCABULARY, rate).apply(tokens, whole(tokens), 17, 4)
    assert inputs.dtype == labels.dtype == np.int64
    ordinary, chosen = ~np.isin(tokens, SPECIAL), labels != IGNORE
    assert chosen[ordinary].mean() == pytest.approx(rate, abs=0.002)
    masked = chosen & (inputs == MASK)
    kept = chosen & (inputs == tokens)
    drawn = chosen & ~masked & ~kept
    count = chosen.sum()
    assert masked.sum() / count == pytest.approx(0.8, abs=0.005)
    assert kept.sum() / count == pytest.approx(0.1, abs=0.005)  # with one in a thousand draws that hit their own token
    assert drawn.sum() / count == pytest.approx(0.1, abs=0.005)
    # Drawn ids come from all ordinary ids alike.
    ids, times = np.unique(inputs[drawn], return_counts=True)
    assert set(ids.tolist()) == set(range(1_000)) - set(SPECIAL)
    expected = drawn.sum() / len(ids)
    assert np.abs(times - expected).max() < 6 * expected**0.5


def test_labels_stand_where_tokens_were_chosen_only(tokens):
    inputs, labels = MaskedLM(VOCABULARY, 0.3).apply(tokens, whole(tokens), 17, 4)
    chosen = labels != IGNORE
    assert np.array_equal(labels[chosen], tokens[chosen])
    assert np.array_equal(inputs[~chosen], tokens[~chosen])


def test_special_tokens_are_neither_chosen_nor_drawn(tokens):
    inputs, labels = MaskedLM(VOCABULARY, 0.99).apply(tokens, whole(tokens), 1, 1)
    assert not np.isin(labels, SPECIAL).any()
    new = inputs != tokens
    assert not np.isin(inputs[new & (inputs != MASK)], SPECIAL).any()
    assert np.isin(tokens, SPECIAL).sum() == 6_000  # there were some to choose


def test_masking_depends_on_seed_and_sample_alone(tokens):
    some = tokens[:5_000]
    before = MaskedLM(VOCABULARY, 0.3).apply(some, whole(some), 17, 4)
    np.random.default_rng().random()
    objective = MaskedLM(VOCABULARY, 0.3)
    objective.apply(some[:100], whole(some[:100]), 17, 4)
    after = objective.apply(some, np.array([1_000, 4_000]), 17, 4)
    assert np.array_equal(before, after)
    for seed, sample in ((18, 4), (17, 5), (4, 17)):
        other = objective.apply(some, whole(some), seed, sample)
        shared = ((other[1] != IGNORE) & (before[1] != IGNORE)).mean()
        assert shared == pytest.approx(0.09, abs=0.03)  # as independent draws: 0.3 * 0.3


def test_masking_leaves_its_input_alone(tokens):
    some = tokens[:1_000].copy()
    some.flags.writeable = False
    inputs, labels = MaskedLM(VOCABULARY, 0.3).apply(some, whole(some), 1, 2)
    assert not np.shares_memory(inputs, some)
    assert not np.shares_memory(labels, some)


def test_a_higher_rate_masks_what_a_lower_one_does(tokens):
    """Counter-based numbers: the twins' masks are nested, which makes their losses comparable."""
    some = tokens[:20_000]
    low, high = (MaskedLM(VOCABULARY, rate).apply(some, whole(some), 1, 2)[1] != IGNORE for rate in (0.15, 0.3))
    assert high[low].all()
    assert high.sum() > low.sum() > 0


def test_causal_labels():
    documents = [[CLS, 20, 21, SEP], [CLS, 22, SEP], [23, 24], [25], [PAD, PAD, PAD]]
    tokens = np.array(list(chain(*documents)))
    before = tokens.copy()
    inputs, labels = CausalLM(VOCABULARY).apply(tokens, np.array([len(d) for d in documents]), 17, 4)
    assert inputs.tolist() == before.tolist()
    assert labels.tolist() == [
        *(20, 21, SEP, IGNORE),
        *(22, SEP, IGNORE),
        *(24, IGNORE),
        *(IGNORE,),
        *(IGNORE, IGNORE, IGNORE),
    ]
    assert tokens.tolist() == before.tolist()


def test_causal_labels_of_random_documents():
    rng = np.random.default_rng(1)
    documents = [[CLS, *rng.integers(20, 400, rng.integers(0, 30)).tolist(), SEP] for _ in range(200)]
    tokens = np.array(list(chain(*documents)))
    _, labels = CausalLM(VOCABULARY).apply(tokens, np.array([len(d) for d in documents]), 17, 4)
    assert labels.tolist() == [label for document in documents for label in (*document[1:], IGNORE)]
    assert CLS not in labels
    assert (labels == SEP).sum() == 200


def test_causal_labels_without_a_padding_token():
    vocabulary = Vocabulary(10, (), None, None, None, None, None, "")
    assert CausalLM(vocabulary).apply(np.array([1, 2, 3]), np.array([3]), 0, 0)[1].tolist() == [2, 3, IGNORE]


def test_make():
    assert make("clm", None, VOCABULARY) == CausalLM(VOCABULARY)
    assert make("mlm", 0.15, VOCABULARY) == MaskedLM(VOCABULARY, 0.15)
    assert make("clm", None, VOCABULARY).causal is True
    assert make("mlm", 0.15, VOCABULARY).causal is False
