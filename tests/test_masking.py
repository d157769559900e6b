"""What is masked as a whole: spans of geometric lengths, and occurrences of listed phrases before all else."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_detour.objectives import IGNORE, Masking
from megatron_detour.objectives.masking import _span_begins
from megatron_detour.tokenizer.entities import Entities
from tests.test_objectives import VOCABULARY, WORDS

LENGTH, DOCUMENTS = 600, 2_000
NUMBERS, LENGTHS = np.arange(DOCUMENTS), np.full(DOCUMENTS, LENGTH)


def masked(tokens: np.ndarray, rate: float, **units) -> np.ndarray:
    """bool [documents, LENGTH]: what is masked of documents of one length."""
    count = len(tokens)
    labels = (
        Masking(VOCABULARY, rate, **units).apply(tokens.reshape(-1), LENGTHS[:count], 17, NUMBERS[:count]).all_labels()
    )
    return labels.reshape(tokens.shape) != IGNORE


def geometric(longest: int) -> np.ndarray:
    """Probabilities of the lengths 1 to `longest` of SpanBERT's spans."""
    weights = 0.2 * 0.8 ** np.arange(longest)
    return weights / weights.sum()


@pytest.mark.parametrize("longest", [10, 3])
def test_lengths_of_spans(longest):
    """The first spans of documents, which their ends do not cut: chi squared of 60,000."""
    begins = _span_begins(longest, 17, NUMBERS, LENGTHS, None)
    assert (np.diff(begins) > 0).all() and set(range(0, LENGTH * DOCUMENTS, LENGTH)) <= set(begins.tolist())
    lengths = np.concatenate(
        [np.diff(begins[np.searchsorted(begins, first) :][:31]) for first in range(0, LENGTH * DOCUMENTS, LENGTH)]
    )
    seen = np.bincount(lengths, minlength=longest + 1)
    assert len(seen) == longest + 1 and not seen[0]
    expected = geometric(longest) * len(lengths)
    assert ((seen[1:] - expected) ** 2 / expected).sum() < longest - 1 + 4 * (2 * (longest - 1)) ** 0.5
    if longest == 10:
        assert lengths.mean() == pytest.approx(3.797, abs=4 * 2.5 / len(lengths) ** 0.5)  # 3.8 in the paper


@pytest.mark.parametrize("words", [None, WORDS], ids=["tokens", "words"])
@pytest.mark.parametrize("rate", [0.15, 0.3])
def test_spans_are_masked_at_the_rate_and_as_a_whole(rate, words):
    """A neighbor is masked too if it is of the same span, or by chance."""
    word = [20] if words is None else [20, 21]  # words of two tokens: the odd id continues the even one
    tokens = np.tile(word, DOCUMENTS * LENGTH // len(word)).reshape(DOCUMENTS, LENGTH)
    chosen = masked(tokens, rate, words=words, longest_span=10)
    spans = DOCUMENTS * LENGTH / len(word) / 3.797
    squares = (np.arange(1, 11) ** 2 * geometric(10)).sum()
    assert chosen.mean() == pytest.approx(rate, abs=4 * (rate * (1 - rate) * squares / spans) ** 0.5 / 3.797)
    units = chosen[:, :: len(word)]
    assert np.array_equal(np.repeat(units, len(word), axis=1), chosen)  # words are whole
    middle = units[:, 50:]  # where spans begin anywhere
    both = (middle[:, 1:] & middle[:, :-1]).sum() / middle[:, :-1].sum()
    same = 1 - 1 / 3.797
    assert both == pytest.approx(same + (1 - same) * rate, abs=0.01)


def test_higher_rates_mask_the_spans_of_lower_ones():
    tokens = np.full((50, LENGTH), 20)
    low, high = (masked(tokens, rate, longest_span=10) for rate in (0.15, 0.3))
    assert high[low].all() and high.sum() > 1.5 * low.sum() > 0


@pytest.fixture(scope="module")
def listed() -> Entities:
    """A word of one token, and two words of two."""
    return Entities.from_ids([[40], [50, 51, 52]], WORDS, 1_000)


def text(share: float, documents: int = DOCUMENTS) -> tuple[np.ndarray, np.ndarray]:
    """Documents of other words and of listed ones, as about `share` of the tokens, and which tokens these are."""
    rows, rng = [], np.random.default_rng(5)
    for _ in range(documents):
        row: list[int] = []
        while len(row) < LENGTH:
            row += [[40], [50, 51, 52]][rng.integers(2)] if rng.random() < share / (2 - share) else [60]
        rows.append((row[: LENGTH - 3] + [60] * 3)[:LENGTH])
    tokens = np.array(rows)
    cut = (tokens == 50) & (np.roll(tokens, -2, axis=1) != 52)  # what the end of the document has cut
    tokens[cut] = 60
    tokens[(tokens == 51) & (np.roll(tokens, 1, axis=1) != 50)] = 61
    return tokens, np.isin(tokens, [40, 50, 51, 52])


def test_all_listed_words_are_masked_and_others_up_to_the_rate(listed):
    tokens, of_list = text(0.05)
    assert 0.03 < of_list.mean() < 0.07
    chosen = masked(tokens, 0.3, entities=listed)
    assert chosen[of_list].all()
    # A document's expected number is the rate's, however many of its words are listed.
    others = 0.3 * LENGTH - of_list.sum(axis=1)
    deviation = (others * (1 - others / LENGTH)).mean() ** 0.5
    assert (chosen.sum(axis=1) - 0.3 * LENGTH).mean() == pytest.approx(0, abs=4 * deviation / DOCUMENTS**0.5)
    assert np.abs(chosen.sum(axis=1) - 0.3 * LENGTH).max() < 6 * deviation


def test_no_other_word_is_masked_where_listed_ones_exceed_the_rate(listed):
    tokens, of_list = text(0.6)
    chosen = masked(tokens, 0.15, entities=listed)
    assert of_list.mean() > 0.3 and not chosen[~of_list].any()
    assert chosen.mean() == pytest.approx(0.15, abs=4 * (0.15 * 3 / chosen.size) ** 0.5)
    starts = np.flatnonzero(tokens == 50)
    flat = chosen.reshape(-1)
    assert (flat[starts] == flat[starts + 1]).all() and (flat[starts] == flat[starts + 2]).all()  # phrases are whole
    assert 0 < flat[starts].mean() < 1


def test_listed_words_come_first_among_whole_words_and_spans(listed):
    tokens, of_list = text(0.05, 200)
    for units in ({"words": WORDS}, {"longest_span": 10}, {"words": WORDS, "longest_span": 10}):
        chosen = masked(tokens, 0.3, entities=listed, **units)
        assert chosen[of_list].all()
        assert chosen.mean() == pytest.approx(0.3, abs=0.02)


def test_documents_without_listed_words_are_masked_at_the_rate(listed):
    tokens = np.full((200, LENGTH), 60)
    assert np.array_equal(masked(tokens, 0.3, entities=listed), masked(tokens, 0.3))
