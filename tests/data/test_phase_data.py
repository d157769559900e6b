"""Phases that read the same data go on in one order; others go on in each corpus where it was left."""

from __future__ import annotations

import random
from itertools import chain

import pytest

from megatron_detour.config import Corpus, from_dict
from megatron_detour.data.batches import DocumentMixture
from megatron_detour.data.phase_data import PhaseData
from megatron_detour.plan import Plan
from megatron_detour.tokenizer.vocabulary import Vocabulary, load_tokenizer
from tests.conftest import build, sentences, write_jsonl

LENGTH = 64


@pytest.fixture(scope="module")
def prefixes(tokenizer_folder, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("course")
    for number, name in enumerate("abc"):
        texts = [sentences(random.Random(f"{name}{i}"), 3) for i in range(200 + number)]
        build([write_jsonl(folder / f"{name}.jsonl", texts)], folder / name, tokenizer_folder)
    return [str(folder / name) for name in "abc"]


@pytest.fixture(scope="module")
def vocabulary(tokenizer_folder) -> Vocabulary:
    return Vocabulary.from_tokenizer(load_tokenizer(tokenizer_folder))


def data_of(prefixes: list[str], vocabulary: Vocabulary, phases: list[dict]) -> tuple[Plan, PhaseData]:
    raw = {
        "name": "course",
        "folder": "unused",
        "model": {"start": "unused"},
        "data": {"corpora": [{"prefix": p, "weight": w} for p, w in zip(prefixes, (2, 1, 1), strict=True)],
                 "sequence_length": LENGTH},
        "batch": {"sequences": 8},
        "phases": [
            {"name": f"phase{i}", "objective": "clm", "learning_rate": {"peak": 1}, "tokens": "2 steps"} | phase
            for i, phase in enumerate(phases)
        ],
        "deepspeed": "unused",
    }  # fmt: skip
    plan = Plan.from_config(from_dict(raw))
    return plan, PhaseData(plan, 42, vocabulary)


def read(plan: Plan, data: PhaseData) -> list[list[bytes]]:
    """The documents of each phase."""
    return [documents_of(data.mixture(phase), phase.start, phase.end) for phase in plan.phases]


def documents_of(mixture: DocumentMixture, start: int, stop: int) -> list[bytes]:
    documents = mixture.documents(start, stop)
    return [mixture.tokens(documents[i : i + 1]).tobytes() for i in range(len(documents))]


def test_phases_with_the_same_data_read_one_order(prefixes, vocabulary):
    plan, data = data_of(prefixes, vocabulary, [{}, {"sequences": 4}, {}])
    assert len(data.spans) == 1
    whole = DocumentMixture(plan.phases[0].corpora, LENGTH, 42, vocabulary)
    assert sorted(chain(*read(plan, data))) == sorted(documents_of(whole, 0, plan.total_tokens))


def test_other_weights_and_companies_go_on_where_a_corpus_was_left(prefixes, vocabulary):
    a, b, c = prefixes
    phases = [
        {},
        {"corpora": [{"prefix": b}]},
        {"corpora": [{"prefix": c, "weight": 3}, {"prefix": b, "weight": 1}]},
        {},
    ]
    plan, data = data_of(prefixes, vocabulary, phases)
    assert [len(span.mixture.prefixes) for span in data.spans] == [3, 1, 2, 3]
    sequences = {a: 8 + 8, b: 4 + 16 + 4 + 4, c: 4 + 12 + 4}
    documents = read(plan, data)
    expected = []
    for number, prefix in enumerate(prefixes):  # each corpus alone, in the order of its own seed
        alone = DocumentMixture((Corpus(prefix),), LENGTH, 42 + number, vocabulary)
        expected += documents_of(alone, 0, sequences[prefix] * LENGTH)
    assert sorted(chain(*documents)) == sorted(expected)
    assert not set(documents[0]) & set(documents[3])


def test_another_length_goes_on_behind_the_tokens_that_were_read(prefixes, vocabulary):
    only = {"corpora": [{"prefix": prefixes[0]}]}
    plan, data = data_of(prefixes, vocabulary, [only, only | {"sequence_length": 48}, only | {"sequence_length": 32}])
    _, second, third = (data.mixture(phase) for phase in plan.phases)
    assert [phase.start for phase in plan.phases] == [0, 16 * LENGTH, 16 * (LENGTH + 48)]
    for phase, mixture in zip(plan.phases[1:], (second, third), strict=True):
        assert mixture.read_before(phase.start) == {prefixes[0]: phase.start}
        alone = DocumentMixture((Corpus(prefixes[0]),), phase.sequence_length, 42, vocabulary)
        assert documents_of(mixture, phase.start, phase.end) == documents_of(alone, phase.start, phase.end)


def test_manifests_are_told_once(prefixes, vocabulary):
    _, data = data_of(prefixes, vocabulary, [{}, {"corpora": [{"prefix": prefixes[1]}]}])
    assert list(data.manifests()) == prefixes
