"""Masking at its rates, of ordinary tokens only; causal labels inside documents only."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_detour.objectives import (
    IGNORE,
    CausalLM,
    Corrupted,
    MaskedLM,
    Masking,
    NextToken,
    masking,
    read_objective,
    validated,
)
from megatron_detour.objectives.hybrid import Hybrid
from megatron_detour.objectives.masked_next_token import MaskedNextToken
from megatron_detour.tokenizer.entities import Entities
from megatron_detour.tokenizer.vocabulary import Vocabulary
from megatron_detour.tokenizer.word_boundaries import Words

CLS, SEP, PAD, MASK, UNK, EXTRA = 3, 7, 11, 500, 999, 640
SPECIAL = (CLS, SEP, PAD, MASK, EXTRA, UNK)
VOCABULARY = Vocabulary(1_000, tuple(sorted(SPECIAL)), MASK, PAD, CLS, SEP, UNK, "")
SAMPLES, POSITIONS = 4_000, 1_000
NUMBERS = np.arange(SAMPLES)
# Odd ids continue the word before them; all ordinary tokens leave it open.
WORDS = Words((np.arange(1_000) % 2 == 1) & ~VOCABULARY.special(), ~VOCABULARY.special())
# Every fourth even id, alone and with the odd id after it.
LISTED = Entities.from_ids([[i, *odd] for i in range(20, 480, 8) for odd in ([], [i + 1])], WORDS, 1_000)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    """[SAMPLES, POSITIONS]: every id, special ones among them, four thousand times each."""
    ids = np.random.default_rng(0).permutation(np.arange(SAMPLES * POSITIONS) % 1_000)
    return ids.reshape(SAMPLES, POSITIONS).astype(np.int32)


@dataclass(frozen=True)
class Rows(Corrupted):
    """Documents of one length, a row each: inputs and labels [samples, positions]."""

    def all_labels(self) -> np.ndarray:
        return Corrupted(self.inputs.reshape(-1), self.labeled, self.labels).all_labels().reshape(self.inputs.shape)


def masked(tokens: np.ndarray, rate: float = 0.3, seed: int = 17, numbers=None, words=None) -> Rows:
    numbers = np.arange(len(tokens)) if numbers is None else np.array(numbers)
    lengths = np.full(tokens.shape[0], tokens.shape[1])
    corrupted = Masking(VOCABULARY, rate, words).apply(tokens.reshape(-1), lengths, seed, numbers)
    return Rows(corrupted.inputs.reshape(tokens.shape), corrupted.labeled, corrupted.labels)


def chosen(corrupted: Corrupted) -> np.ndarray:
    """bool, as all_labels."""
    return corrupted.all_labels() != IGNORE


@pytest.mark.parametrize("words", [None, WORDS], ids=["tokens", "words"])
@pytest.mark.parametrize("rate", [0.15, 0.30])
def test_rates_of_masking(tokens, rate, words):
    """Within four standard deviations of the rates, which of four million tokens is within 0.2% of the choice."""
    corrupted = masked(tokens, rate, words=words)
    assert {corrupted.inputs.dtype, corrupted.labels.dtype, corrupted.labeled.dtype} == {np.dtype(np.int64)}
    ordinary, labels = ~np.isin(tokens, SPECIAL), corrupted.all_labels()
    labeled, count = labels != IGNORE, len(corrupted.labels)
    per_word = 1 if words is None else 3  # as if fewer were drawn: a word's tokens are drawn as one
    within = max(0.002 * rate, 4 * (per_word * rate * (1 - rate) / ordinary.sum()) ** 0.5)
    assert labeled[ordinary].mean() == pytest.approx(rate, abs=within)
    masks = labeled & (corrupted.inputs == MASK)
    kept = labeled & (corrupted.inputs == tokens)
    drawn = labeled & ~masks & ~kept
    # A draw in a thousand hits the token that was there.
    for action, share in ((masks, 0.8), (kept, 0.1 + 0.1 / 994), (drawn, 0.1 - 0.1 / 994)):
        assert action.sum() / count == pytest.approx(share, abs=4 * (share * (1 - share) / count) ** 0.5)
    # Drawn ids come from all ordinary ids alike.
    ids, times = np.unique(corrupted.inputs[drawn], return_counts=True)
    assert set(ids.tolist()) == set(range(1_000)) - set(SPECIAL)
    expected = drawn.sum() / len(ids)
    assert ((times - expected) ** 2 / expected).sum() < len(ids) + 4 * (2 * len(ids)) ** 0.5  # chi squared


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """In standard deviations of what independent draws would show."""
    return abs(np.corrcoef(a.reshape(-1), b.reshape(-1))[0, 1]) * a.size**0.5


def test_masks_of_neighbours_are_independent():
    """Positions, samples, seeds; the choice and what becomes of the chosen ones."""
    tokens = np.full((1_000, 1_000), 20)
    one = masked(tokens, seed=17)
    other_seed = masked(tokens, seed=18)
    for picture in (chosen, lambda corrupted: corrupted.inputs == MASK, lambda corrupted: corrupted.inputs % 2 == 0):
        seen = picture(one)
        for distance in (1, 2, 3, 4, 8, 64):
            assert correlation(seen[:, distance:], seen[:, :-distance]) < 5, f"positions {distance} apart"
            assert correlation(seen[distance:], seen[:-distance]) < 5, f"samples {distance} apart"
        assert correlation(seen, picture(other_seed)) < 5
        assert correlation(seen, picture(one).T.copy()) < 5
        assert seen.mean(axis=0).std() == pytest.approx((seen.mean() * (1 - seen.mean()) / 1_000) ** 0.5, rel=0.15)


def test_labels_stand_where_tokens_were_chosen_only(tokens):
    corrupted = masked(tokens[:100])
    labels = corrupted.all_labels()
    assert np.array_equal(labels[chosen(corrupted)], tokens[:100][chosen(corrupted)])
    assert np.array_equal(corrupted.inputs[~chosen(corrupted)], tokens[:100][~chosen(corrupted)])
    assert np.array_equal(np.flatnonzero(chosen(corrupted)), corrupted.labeled)
    assert np.array_equal(tokens[:100].reshape(-1)[corrupted.labeled], corrupted.labels)


@pytest.mark.parametrize("words", [None, WORDS], ids=["tokens", "words"])
def test_special_tokens_are_neither_chosen_nor_drawn(tokens, words):
    corrupted = masked(tokens, 0.99, words=words)
    assert not np.isin(corrupted.labels, SPECIAL).any()
    new = corrupted.inputs != tokens
    assert not np.isin(corrupted.inputs[new & (corrupted.inputs != MASK)], SPECIAL).any()
    assert np.isin(tokens, SPECIAL).sum() == 24_000  # there were some to choose


@given(
    numbers=st.lists(st.integers(0, 2**60), min_size=1, max_size=6, unique=True),
    lengths=st.lists(st.integers(1, 70), min_size=6, max_size=6),
    block=st.sampled_from([1, 100, 1 << 16]),
    words=st.sampled_from([None, WORDS]),
    longest_span=st.sampled_from([None, 10]),
    entities=st.sampled_from([None, LISTED]),
)
@settings(deadline=None, max_examples=100)
def test_a_document_is_corrupted_alike_in_any_company(tokens, numbers, lengths, block, words, longest_span, entities):
    lengths = np.array(lengths[: len(numbers)])
    some, objective = tokens.reshape(-1)[: lengths.sum()], Masking(VOCABULARY, 0.3, words, longest_span, entities)
    together = objective.apply(some, lengths, 17, np.array(numbers))
    bounds = np.cumsum(lengths)[:-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masking, "BLOCK", block)
        for number, text, inputs, labels in zip(
            numbers,
            np.split(some, bounds),
            np.split(together.inputs, bounds),
            np.split(together.all_labels(), bounds),
            strict=True,
        ):
            alone = objective.apply(text, np.array([len(text)]), 17, np.array([number]))
            assert np.array_equal(alone.inputs, inputs)
            assert np.array_equal(alone.all_labels(), labels)
        again = objective.apply(some, lengths, 17, np.array(numbers))
        assert np.array_equal(again.inputs, together.inputs)
        assert np.array_equal(again.labeled, together.labeled)


def test_masking_depends_on_seed_and_sample(tokens):
    some = tokens[:1]
    before = masked(some, seed=17, numbers=[4])
    for seed, sample in ((18, 4), (17, 5), (4, 17)):
        other = masked(some, seed=seed, numbers=[sample])
        shared = (chosen(other) & chosen(before)).mean()
        assert shared == pytest.approx(0.09, abs=0.03)  # as independent draws: 0.3 * 0.3


def test_masks_are_the_same_on_every_machine():
    """Runs resume by them: a change here is a change of every run's masks."""
    corrupted = masked(np.arange(20, 100)[None], seed=17, numbers=[4])
    places = dict(zip(corrupted.labeled.tolist(), corrupted.inputs[0, corrupted.labeled].tolist(), strict=True))
    masks = " ".join(str(place) for place, token in places.items() if token == MASK)
    assert masks == "0 9 16 17 21 22 25 27 30 33 37 39 42 45 46 49 50 72 78"
    others = {place: token for place, token in places.items() if token != MASK}
    assert others == {
        1: 21,
        31: 786,
        32: 52,
        34: 760,
        63: 464,
        66: 86,
        69: 89,
    }


def test_masking_leaves_its_input_alone(tokens):
    some = tokens[:2].astype(np.int64)
    some.flags.writeable = False
    corrupted = masked(some)
    assert not np.shares_memory(corrupted.inputs, some)
    assert np.array_equal(some, tokens[:2])


@pytest.mark.parametrize("words", [None, WORDS], ids=["tokens", "words"])
def test_a_higher_rate_masks_what_a_lower_one_does(tokens, words):
    """Counter-based numbers: the twins' masks are nested, which makes their losses comparable."""
    low, high = (chosen(masked(tokens[:20], rate, words=words)) for rate in (0.15, 0.3))
    assert high[low].all()
    assert high.sum() > low.sum() > 0


def test_all_tokens_of_a_word_are_chosen_or_none():
    """Also where documents and special tokens part them."""
    rng = np.random.default_rng(3)
    flat = rng.choice([20, 21, 23, 25, 27, SEP], 200 * 64)
    lengths = np.tile([10, 1, 33, 20], 200)
    labeled = chosen(Masking(VOCABULARY, 0.4, WORDS).apply(flat, lengths, 17, np.arange(800)))
    firsts = set((np.cumsum(lengths) - lengths).tolist())
    words: list[list[int]] = []
    for place, token in enumerate(flat.tolist()):
        if place in firsts or token in (20, SEP) or flat[place - 1] == SEP:
            words.append([])
        words[-1].append(place)
    assert max(len(word) for word in words) > 5
    assert all(len(set(labeled[word].tolist())) == 1 for word in words)
    # Two documents' words that meet are chosen apart, as are words that follow each other.
    assert any(labeled[place] != labeled[place - 1] and flat[place] != 20 for place in firsts if place)
    share = labeled[flat != SEP].mean()
    assert share == pytest.approx(0.4, abs=0.03)


def test_actions_of_a_word_are_drawn_token_by_token():
    tokens = np.full((50, 100), 21)
    corrupted = masked(tokens, 0.5, words=WORDS)
    rows = [row for row in corrupted.inputs if (row == MASK).any()]
    assert 10 < len(rows) < 40
    assert chosen(corrupted).all(axis=1).sum() == len(rows)
    assert all(0.6 < (row == MASK).mean() < 0.95 for row in rows)


def causal(documents: list[list[int]], vocabulary: Vocabulary = VOCABULARY) -> Corrupted:
    tokens = np.array(list(chain(*documents)))
    before = tokens.copy()
    corrupted = NextToken(vocabulary).apply(
        tokens, np.array([len(d) for d in documents]), 17, np.arange(len(documents))
    )
    assert corrupted.inputs.tolist() == tokens.tolist() == before.tolist()
    return corrupted


def test_causal_labels():
    corrupted = causal([[CLS, 20, 21, SEP], [CLS, 22, SEP], [23, 24], [25], [PAD, PAD, PAD]])
    assert corrupted.all_labels().tolist() == [
        *(20, 21, SEP, IGNORE),
        *(22, SEP, IGNORE),
        *(24, IGNORE),
        *(IGNORE,),
        *(IGNORE, IGNORE, IGNORE),
    ]


def test_causal_labels_of_random_documents():
    rng = np.random.default_rng(1)
    documents = [[CLS, *rng.integers(20, 400, rng.integers(0, 30)).tolist(), SEP] for _ in range(200)]
    labels = causal(documents).all_labels()
    assert labels.tolist() == [label for document in documents for label in (*document[1:], IGNORE)]
    assert CLS not in labels
    assert (labels == SEP).sum() == 200


def test_causal_labels_without_a_padding_token():
    vocabulary = Vocabulary(10, (), None, None, None, None, None, "")
    assert causal([[1, 2, 3]], vocabulary).all_labels().tolist() == [2, 3, IGNORE]


def test_an_objective_is_bound_to_a_vocabulary():
    assert CausalLM().bind(VOCABULARY, WORDS) == NextToken(VOCABULARY)
    assert MaskedLM(0.15).bind(VOCABULARY, WORDS) == Masking(VOCABULARY, 0.15)
    assert MaskedLM(0.15, whole_word_masking=True).bind(VOCABULARY, WORDS).words is WORDS
    for kind in (CausalLM(), MaskedLM(0.15), MaskedNextToken(0.15), MaskedNextToken(0.15, causal=True)):
        assert kind.bind(VOCABULARY).causal is kind.causal


@pytest.mark.parametrize("direction", [False, True])
def test_a_masked_token_is_predicted_at_the_position_before_it(tokens, direction):
    lengths = np.tile([1, 70, 29], 10)
    some, numbers = tokens.reshape(-1)[:1_000], np.arange(30)
    before = MaskedNextToken(0.3, causal=direction).bind(VOCABULARY).apply(some, lengths, 17, numbers)
    masked_lm = MaskedLM(0.3).bind(VOCABULARY).apply(some, lengths, 17, numbers)
    assert np.array_equal(before.inputs, masked_lm.inputs)
    firsts = set((np.cumsum(lengths) - lengths).tolist())
    places, labels = masked_lm.labeled.tolist(), masked_lm.labels.tolist()
    kept = [(place - 1, label) for place, label in zip(places, labels, strict=True) if place not in firsts]
    assert list(zip(before.labeled.tolist(), before.labels.tolist(), strict=True)) == kept
    assert len(kept) < len(labels)  # some first tokens were masked


def grouped(objective: Hybrid, numbers: np.ndarray, seed: int = 17) -> dict[bool, np.ndarray]:
    """The documents of each direction of attention: indices."""
    return {corruption.causal: which for corruption, which in objective.bind(VOCABULARY).groups(seed, numbers)}


@pytest.mark.parametrize("share", [0.5, 0.0625])
def test_the_share_of_causal_documents(share):
    """Within four standard deviations, for numbers of several corpora; other documents for another seed."""
    numbers = np.concatenate([np.arange(100_000), (1 << 48) + np.arange(100_000)])
    groups = grouped(Hybrid(0.3, causal_share=share), numbers)
    assert np.array_equal(np.sort(np.concatenate(list(groups.values()))), np.arange(200_000))
    deviation = (share * (1 - share) / 200_000) ** 0.5
    assert len(groups[True]) / 200_000 == pytest.approx(share, abs=4 * deviation)
    again = grouped(Hybrid(0.3, causal_share=share), numbers, seed=18)[True]
    assert len(np.intersect1d(again, groups[True])) / 200_000 == pytest.approx(share**2, abs=4 * share / 200_000**0.5)
    causal = np.isin(np.arange(200_000), groups[True])
    assert correlation(causal[1:], causal[:-1]) < 5


@given(numbers=st.lists(st.integers(0, 2**60), min_size=1, max_size=9, unique=True))
@settings(deadline=None, max_examples=60)
def test_a_document_has_its_direction_in_any_company(numbers):
    together = grouped(Hybrid(0.3), np.array(numbers))
    assert all(len(which) and (np.diff(which) > 0).all() for which in together.values())
    for causal, which in together.items():
        for index in which:
            assert list(grouped(Hybrid(0.3), np.array([numbers[index]]))) == [causal]


def test_documents_of_a_hybrid_are_corrupted_as_in_clm_and_mntp():
    objective = Hybrid(0.3, causal_share=0.25, whole_word_masking=True)
    (causal, first), (masked, other) = objective.bind(VOCABULARY, WORDS).groups(17, NUMBERS)
    assert causal == NextToken(VOCABULARY) and len(first) < len(other)
    some, lengths = np.arange(20, 420), np.full(4, 100)
    expected = (
        MaskedNextToken(0.3, whole_word_masking=True).bind(VOCABULARY, WORDS).apply(some, lengths, 17, NUMBERS[:4])
    )
    assert np.array_equal(masked.apply(some, lengths, 17, NUMBERS[:4]).all_labels(), expected.all_labels())
    assert not masked.causal
    assert objective.bind(VOCABULARY, WORDS).groups(17, NUMBERS[:0])[0][1].shape == (0,)


def test_the_labeled_share_is_what_the_corruption_labels():
    """The forecast counts the head's work by it."""
    lengths, ordinary = np.full(100, 100), np.full(10_000, 20)
    for objective in (CausalLM(), MaskedLM(0.3), MaskedLM(0.3, longest_span=10), MaskedNextToken(0.3), Hybrid(0.3)):
        labeled = 0
        for corruption, which in objective.bind(VOCABULARY).groups(17, NUMBERS[:100]):
            labeled += len(corruption.apply(ordinary[: 100 * len(which)], lengths[which], 17, which).labels)
        assert labeled / 10_000 == pytest.approx(objective.labeled_share(100, 1_000), abs=0.03), objective.name
    assert MaskedLM(0.3, 0.1).labeled_share(100, 1_000) == pytest.approx(0.2)
    assert MaskedLM(0.4, mask_rate_steps=((200, 0.3), (600, 0.1))).labeled_share(100, 1_000) == pytest.approx(0.24)


def test_a_run_is_validated_with_what_it_trains_and_with_what_runs_are_compared_by():
    assert list(validated()) == ["mlm", "clm"]
    assert validated([CausalLM(), Hybrid(0.3), Hybrid(0.2)]) == {"mlm": MaskedLM, "clm": CausalLM, "hybrid": Hybrid}


@pytest.mark.parametrize(
    ("phase", "text"),
    [
        ({"objective": "clm", "mask_rate": None, "mask_rate_end": None}, "CLM"),
        ({"objective": "mlm", "mask_rate": 0.3}, "MLM, 30% masked"),
        ({"objective": "mlm", "mask_rate": 0.3, "whole_word_masking": True}, "MLM, 30% masked, whole words"),
        ({"objective": "mlm"}, "MLM"),
        ({"objective": "of another version"}, "OF ANOTHER VERSION"),
        ({"objective": "mlm", "mask_rate": 0.3, "mask_rate_end": 0.3}, "MLM, 30% masked"),
        ({"objective": "mlm", "mask_rate": 0.3, "mask_rate_end": 0.155}, "MLM, 30% to 15.5% masked"),
        ({"objective": "mlm", "mask_rate": 0.4, "mask_rate_steps": [[5, 0.3]]}, "MLM, 40% masked, then 30%"),
        ({"objective": "mlm", "mask_rate": 0.4, "longest_span": 10}, "MLM, 40% masked, spans of up to 10 tokens"),
        (
            {"objective": "mntp", "mask_rate": 0.4, "longest_span": 5, "whole_word_masking": True, "entities": "a.txt"},
            "MNTP, 40% masked, spans of up to 5 whole words, listed words first",
        ),
        ({"objective": "mntp", "mask_rate": 0.2, "causal": True}, "MNTP, 20% masked, causal"),
        ({"objective": "hybrid", "mask_rate": 0.3, "causal_share": 0.0625}, "Hybrid, 6.25% causal, 30% masked"),
    ],
)
def test_an_objective_in_words(phase, text):
    assert read_objective(phase).describe() == text
