"""The sample corpus: reproducible, consistent in its facts, split without overlap."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from megatron_detour.errors import DetourError

ROOT = Path(__file__).parents[2]
NAMES = ("sample.jsonl", "heldout.jsonl", "probes.jsonl")


def _load():
    spec = importlib.util.spec_from_file_location("sample_generate", ROOT / "examples/sample/generate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


generate = _load()


def _records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _digest(folder: Path) -> list[str]:
    return [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in NAMES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("sample") / "out"
    generate.generate(output, 1.0, 0)
    return output


@pytest.fixture(scope="module")
def records(folder) -> list[dict]:
    return _records(folder / "sample.jsonl") + _records(folder / "heldout.jsonl")


def _pairs(lang: str) -> list[tuple[str, str]]:
    drugs = [(fact.drug, fact.indication) for fact in generate.DRUG_FACTS[lang]]
    return drugs + [(fact.finding, fact.diagnosis) for fact in generate.FINDING_FACTS[lang]]


def _mentioned(names: list[str], text: str) -> set[int]:
    """Numbers of the names that stand in the text as whole words."""
    lower = text.lower()
    return {number for number, name in enumerate(names) if re.search(rf"(?<!\w){re.escape(name.lower())}(?!\w)", lower)}


def test_same_arguments_give_the_same_bytes(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        generate.generate(tmp_path / name, 0.1, seed)
    assert _digest(tmp_path / "a") == _digest(tmp_path / "b")
    assert _digest(tmp_path / "a")[:2] != _digest(tmp_path / "c")[:2]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted([*NAMES, "tasks"])


def test_facts_are_a_function_with_distinct_answers():
    for lang in ("en", "fr"):
        pairs = _pairs(lang)
        assert len(pairs) == 12
        assert len({subject for subject, _ in pairs}) == len({answer for _, answer in pairs}) == 12
        assert all(re.fullmatch(r"[^\W\d_]+", answer) for _, answer in pairs)


@pytest.mark.parametrize("lang", ["en", "fr"])
def test_no_text_pairs_a_subject_with_another_answer(records, lang):
    subjects, answers = ([pair[side] for pair in _pairs(lang)] for side in (0, 1))
    for record in records:
        if record["lang"] != lang:
            continue
        text = record["text"]
        # a document states whole facts only, and so does each sentence that names both sides
        assert 1 <= len(_mentioned(subjects, text)) <= 3, text
        assert _mentioned(subjects, text) == _mentioned(answers, text), text
        for sentence in re.split(r"(?<=[.?])\s", text):
            named = _mentioned(subjects, sentence), _mentioned(answers, sentence)
            assert len(named[0]) <= 1 and (not all(named) or named[0] == named[1]), sentence


@pytest.mark.parametrize("lang", ["en", "fr"])
def test_each_fact_is_in_many_documents_and_none_dominates(records, lang):
    subjects = [subject for subject, _ in _pairs(lang)]
    counts = Counter(
        number for record in records if record["lang"] == lang for number in _mentioned(subjects, record["text"])
    )
    assert min(counts[number] for number in range(12)) >= 30
    assert max(counts.values()) < 0.16 * sum(counts.values())


def test_a_fact_has_several_phrasings(records):
    fact = generate.DRUG_FACTS["en"][0]
    sentences = {
        re.sub(r"\d+", "0", sentence)
        for record in records
        for sentence in re.split(r"(?<=[.?])\s", record["text"])
        if fact.drug in sentence.lower() and fact.indication in sentence.lower()
    }
    assert len(sentences) >= 20


def test_records_size_lengths_and_languages(folder, records):
    size = (folder / "sample.jsonl").stat().st_size
    assert 1_000_000 <= size < 1_002_000
    for record in records:
        assert record.keys() == {"text", "source", "lang", "license"}
        assert (record["source"], record["license"]) == ("generated", "Apache-2.0")
        words = len(record["text"].split())
        assert words <= 200
        assert words < 40 or re.search(r"\b[Ii]nvent(ed|é|és)\b", record["text"]), record["text"]
        assert not re.search(r"[{}]|\b(le|la|de|que) [aeéiouêœ]\w*(ine|ol|one|ie|me)\b", record["text"])
    langs = Counter(record["lang"] for record in records)
    assert abs(langs["en"] - langs["fr"]) <= 1


def test_heldout_shares_no_text_with_the_sample(folder):
    sample, heldout = ([record["text"] for record in _records(folder / name)] for name in NAMES[:2])
    assert 0.015 < len(heldout) / len(sample) < 0.025
    assert {record["lang"] for record in _records(folder / "heldout.jsonl")} == {"en", "fr"}
    assert not set(sample) & set(heldout)
    assert len(set(sample)) == len(sample)


def test_probes_ask_for_facts_in_sentences_that_the_texts_lack(folder, records):
    probes = _records(folder / "probes.jsonl")
    assert Counter(probe["lang"] for probe in probes) == {"en": 5, "fr": 5}
    corpus = "\n".join(record["text"] for record in records)
    for probe in probes:
        assert probe.keys() == {"text", "answer", "lang"} and probe["text"].count(" [MASK]") == 1
        sentence = probe["text"].replace("[MASK]", probe["answer"])
        subjects, answers = ([pair[side] for pair in _pairs(probe["lang"])] for side in (0, 1))
        assert len(_mentioned(subjects, sentence)) == 1 and _mentioned(subjects, sentence) == _mentioned(
            answers, sentence
        )
        assert corpus.count(f" {probe['answer']}") > 20
    novel = [probe for probe in probes if probe["text"].replace("[MASK]", probe["answer"]) not in corpus]
    assert len(novel) >= 7


def test_documents_do_not_repeat():
    texts = [text for text, _ in itertools.islice(generate.documents(1), 2000)]
    assert len(set(texts)) == 2000


@pytest.mark.parametrize("size", [0, -1, float("nan")])
def test_size_must_be_positive(tmp_path, size):
    with pytest.raises(DetourError, match="--megabytes"):
        generate.generate(tmp_path / "out", size)


def test_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("kept")
    with pytest.raises(DetourError, match="not a folder"):
        generate.generate(tmp_path / "out", 0.1)
