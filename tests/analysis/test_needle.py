"""Needles: the facts, the documents that hide them, and the probe."""

from __future__ import annotations

import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from megatron_detour.analysis.hidden_states import Encoder
from megatron_detour.analysis.needle import Rate, build_classifier, measure_needle, train_classifier
from megatron_detour.analysis.needle_examples import PLACES, Needle, NeedleOptions, make_needles, splits
from megatron_detour.analysis.needle_facts import LEXICONS, TEMPLATES, Fact, draw_fact, other_fact, slots_of
from megatron_detour.errors import DetourError
from tests.analysis.twins import write_twin
from tests.conftest import sentences

LENGTHS = (224, 256)


@pytest.fixture(scope="module")
def model(tokenizer_folder, tmp_path_factory):
    return write_twin(tmp_path_factory.mktemp("models") / "model", tokenizer_folder)


@pytest.fixture(scope="module")
def documents():
    rng = random.Random(9)
    return [sentences(rng, rng.randint(1, 8)) for _ in range(30)]


def make(model, documents, **changes):
    options = NeedleOptions(**{"language": "en", "lengths": LENGTHS, "examples": 240, "seed": 1} | changes)
    return make_needles(AutoTokenizer.from_pretrained(model), documents, options)


@pytest.mark.parametrize("language", TEMPLATES)
def test_facts_have_two_to_four_slots_and_lexicons_of_distinct_values(language):
    assert len(TEMPLATES[language]) == 8
    used = set()
    for template in range(8):
        assert 2 <= len(slots_of(language, template)) <= 4
        used |= set(slots_of(language, template))
    assert used == LEXICONS[language].keys()
    assert all(len(set(values)) == len(values) >= 7 for values in LEXICONS[language].values())


def test_another_fact_differs_in_every_slot():
    rng = random.Random(0)
    seen = set()
    for _ in range(200):
        for language in TEMPLATES:
            fact = draw_fact(language, rng)
            other = other_fact(fact, rng)
            assert other.template == fact.template and "{" not in fact.text
            assert all(a != b for a, b in zip(fact.values, other.values, strict=True))
            seen.add((language, fact.template))
    assert len(seen) == 16
    fact = Fact("fr", 2, ("Lacroix", "grise", "la nuque"))
    assert fact.text == "L'infirmière Lacroix a remarqué une tache grise sur la nuque."


def test_examples_are_balanced_in_every_split(model, documents):
    needles = make(model, documents)
    assert [len(needle.ids) for needle in needles] == [needle.length for needle in needles]
    by_split = Counter(needle.split for needle in needles)
    assert by_split == {"train": 168, "dev": 36, "test": 36}
    cells = Counter((n.split, n.length, n.place, n.present) for n in needles)
    assert len(cells) == 3 * 2 * 3 * 2
    assert all(count in ((14,) if split == "train" else (3,)) for (split, *_), count in cells.items())
    assert Counter(splits(1500)) == {"train": 1050, "dev": 225, "test": 225}


def test_a_positive_holds_its_question_and_a_negative_another_fact(model, documents):
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = {}
    for language in TEMPLATES:
        for needle in make(model, documents, language=language):
            question, document = tokenizer.decode(needle.ids).split("[SEP]")[:2]
            question = question.removeprefix("[CLS]").strip()
            assert (question in document) == needle.present
            texts.setdefault((language, needle.place), []).append((document.strip(), question, needle))
    for (_, place), found in texts.items():
        for document, question, needle in found:
            if needle.present:
                at = document.index(question)
                if place == "start":
                    assert at == 0
                elif place == "end":
                    assert document.endswith(question)
                else:  # at the sentence nearest to the middle; a sentence is a quarter of the document at most
                    assert 0.2 < (at + len(question) / 2) / len(document) < 0.8
                    assert document[:at].rstrip()[-1] in ".!?"


def test_examples_depend_on_the_seed_alone(model, documents):
    assert make(model, documents) == make(model, documents)
    assert make(model, documents) != make(model, documents, seed=2)


def test_what_makes_no_examples_is_refused(model, documents):
    for changes, why in (
        ({"examples": 83}, "give at least 84"),
        ({"lengths": (40,)}, "do not hold a question"),
        ({"lengths": (100_000,)}, "the documents have .* tokens, fewer than"),
    ):
        with pytest.raises(DetourError, match=why):
            make(model, documents, **changes)
    with pytest.raises(DetourError, match="longest input is 256 tokens"):
        measure_needle(model, documents, NeedleOptions(lengths=(512,)))


def test_the_state_is_that_of_the_first_token_of_transformers(model, documents):
    needles = make(model, documents)[::40]
    encoder = Encoder.open(model)
    found = encoder.first_outputs([list(needle.ids) for needle in needles], batch_tokens=400)
    for row, needle in zip(found, needles, strict=True):
        with torch.inference_mode():
            alone = encoder.network(torch.tensor([needle.ids])).last_hidden_state[0, 0]
        torch.testing.assert_close(row, alone, atol=2e-5, rtol=1e-4)


def test_the_probe_learns_what_a_state_tells_and_nothing_from_noise():
    """1,500 examples in the paper's setting, of states whose first number is the answer, or is not."""
    lengths, generator = (1, 2), torch.Generator().manual_seed(0)
    parts = [(n, place, present) for n in lengths for place in PLACES for present in (True, False)]
    needles = [Needle((), *parts[number % len(parts)], split) for number, split in enumerate(splits(1500))]
    noise = torch.randn(1500, 64, generator=generator)
    telling = noise.clone()
    telling[:, 0] = torch.tensor([6.0 if needle.present else -6.0 for needle in needles])
    outcome = train_classifier(telling, needles, 42, NeedleOptions(learning_rate=1e-3))
    assert np.mean(outcome.right) == 1 and outcome.dev_accuracy == 1 and outcome.epoch == 1
    assert abs(np.mean(train_classifier(noise, needles, 42, NeedleOptions(learning_rate=1e-3)).right) - 0.5) < 0.15
    again = train_classifier(noise, needles, 42, NeedleOptions(learning_rate=1e-3))
    assert again == train_classifier(noise, needles, 42, NeedleOptions(learning_rate=1e-3))


def test_the_classifier_is_the_papers():
    kinds = [type(part).__name__ for part in build_classifier(8, 0.1)]
    assert kinds == ["Dropout", "Linear", "GELU", "Dropout", "Linear"]


def test_intervals_are_wilsons():
    """Against scipy's, and at the borders."""
    from scipy.stats import binomtest

    for right, n in ((30, 45), (0, 20), (20, 20), (113, 225)):
        rate = Rate.of([1.0] * right + [0.0] * (n - right))
        reference = binomtest(right, n).proportion_ci(method="wilson")
        assert (rate.low, rate.high) == (
            pytest.approx(reference.low, abs=1e-6),
            pytest.approx(reference.high, abs=1e-6),
        )
        assert rate.accuracy == right / n and rate.examples == n


def test_end_to_end(model, documents):
    options = NeedleOptions(lengths=LENGTHS, examples=84, train_seeds=(1, 2), learning_rate=1e-3)
    done = []
    result = measure_needle(model, documents, options, done.append)
    assert sum(done) == 84
    assert list(result.by_length) == [224, 256] and list(result.by_place) == ["start", "middle", "end"]
    tested = result.all.examples
    assert tested == sum(rate.examples for rate in result.by_length.values()) == splits(84).count("test")
    assert len(result.best_epochs) == 2 and all(1 <= epoch <= 3 for epoch in result.best_epochs)
    weighted = sum(rate.accuracy * rate.examples for rate in result.by_place.values()) / tested
    assert result.all.accuracy == pytest.approx(weighted)
    assert measure_needle(model, documents, options) == result
    json.dumps(result.to_json(), allow_nan=False)
