"""Phases that read the same data go on in one order; others go on in each corpus where it was left."""

from __future__ import annotations

import random
from itertools import chain

import numpy as np
import pytest

from megatron_detour.config import Corpus, from_dict
from megatron_detour.data.batches import Sequences
from megatron_detour.data.course import Course
from megatron_detour.data.vocabulary import Vocabulary, load_tokenizer
from megatron_detour.plan import Plan
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
    return Vocabulary.of(load_tokenizer(tokenizer_folder))


def course_of(prefixes: list[str], vocabulary: Vocabulary, phases: list[dict]) -> tuple[Plan, Course]:
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
    plan = Plan.of(from_dict(raw))
    return plan, Course(plan, 42, vocabulary)


def rows(plan: Plan, course: Course) -> list[list[bytes]]:
    """The sequences of each phase, in order."""
    return [
        [row.tobytes() for row in course.of(phase).read(range(phase.first_sequence, phase.end_sequence)).tokens]
        for phase in plan.phases
    ]


def test_phases_with_the_same_data_read_one_order(prefixes, vocabulary):
    plan, course = course_of(prefixes, vocabulary, [{}, {"sequences": 4}, {}])
    assert len(course.segments) == 1
    corpora = plan.phases[0].corpora
    whole = Sequences(corpora, LENGTH, 42, vocabulary).read(range(plan.phases[-1].end_sequence)).tokens
    assert list(chain(*rows(plan, course))) == [row.tobytes() for row in whole]


def test_other_weights_and_companies_go_on_where_a_corpus_was_left(prefixes, vocabulary):
    a, b, c = prefixes
    phases = [
        {},
        {"corpora": [{"prefix": b}]},
        {"corpora": [{"prefix": c, "weight": 3}, {"prefix": b, "weight": 1}]},
        {},
    ]
    plan, course = course_of(prefixes, vocabulary, phases)
    read = rows(plan, course)
    assert [len(segment.sequences.prefixes) for segment in course.segments] == [3, 1, 2, 3]
    counts = {a: 8 + 8, b: 4 + 16 + 4 + 4, c: 4 + 12 + 4}
    everything = sorted(chain(*read))
    expected = []
    for number, prefix in enumerate(prefixes):  # each corpus alone, in the order of its own seed
        alone = Sequences((Corpus(prefix),), LENGTH, 42 + number, vocabulary).read(range(counts[prefix])).tokens
        expected += [row.tobytes() for row in alone]
    assert everything == sorted(expected)
    assert len(set(read[0]) & set(read[3])) == 0


def test_another_length_begins_behind_the_tokens_that_were_read(prefixes, vocabulary):
    only = [{"prefix": prefixes[0]}]
    plan, course = course_of(
        prefixes,
        vocabulary,
        [{"corpora": only}, {"corpora": only, "sequence_length": 48}, {"corpora": only, "sequence_length": 32}],
    )
    _, second, third = (course.of(phase) for phase in plan.phases)
    assert plan.phases[1].first_sequence == 16 and plan.phases[2].first_sequence == 32
    assert second.packs_read(16) == {prefixes[0]: -(-16 * LENGTH // 48)}
    assert third.packs_read(32) == {prefixes[0]: -(-(22 + 16) * 48 // 32)}
    alone = Sequences((Corpus(prefixes[0]),), 48, 42, vocabulary)
    np.testing.assert_array_equal(second.read(range(16, 32)).tokens, alone.read(range(22, 38)).tokens)


def test_manifests_are_told_once(prefixes, vocabulary):
    _, course = course_of(prefixes, vocabulary, [{}, {"corpora": [{"prefix": prefixes[1]}]}])
    assert list(course.manifests()) == prefixes
