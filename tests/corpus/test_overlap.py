"""Documents that share words in a row with excluded texts are left out of a corpus."""

from __future__ import annotations

import gzip
import json
import random
import string

import pytest

from megatron_detour.corpus.overlap import Overlap
from megatron_detour.data.manifest import read_manifest
from megatron_detour.errors import DetourError
from tests.conftest import build, write_jsonl

TEXT = "The patient was given metformin, twice a day; after two weeks the fever of 38.5 °C had gone."
WORDS = ("a", "É", "é", "Été", "7", "38", "œdema", "B", "b")
SHARED = "Note: AFTER two weeks, the fever (of 38.5 °C) was back."


def write_task(folder, **record):
    (folder / "task").mkdir(parents=True)
    (folder / "task" / "train.jsonl").write_text(json.dumps({"text": "one two three four five"}))
    with gzip.open(folder / "task" / "test.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return folder


def plainly_shared(text: str, excluded: str, words: int) -> bool:
    def runs(of: str) -> set[tuple[str, ...]]:
        found = "".join(c if c.isalnum() else " " for c in of.lower()).split()
        return {tuple(found[i : i + words]) for i in range(len(found) - words + 1)}

    return not runs(text).isdisjoint(runs(excluded))


@pytest.mark.parametrize(
    "record",
    [
        {"text": TEXT, "label": "x"},
        {"tokens": TEXT.split(), "tags": ["O"] * len(TEXT.split())},
        {"question": "?", "options": {"A": "no", "B": TEXT}},
        {"text_a": "nothing", "text_b": TEXT, "score": 1.5},
    ],
)
def test_every_text_of_a_tasks_test_split_counts(tmp_path, record):
    overlap = Overlap([str(write_task(tmp_path, **record))], 8)
    assert overlap.shared_by(SHARED)
    assert not overlap.shared_by("After two weeks the fever had gone, as it does.")
    assert not overlap.shared_by("one two three four five one two three four five")  # the train split's
    assert not overlap.shared_by("too short")


def test_runs_are_found_as_a_plain_search_finds_them(tmp_path):
    rng = random.Random(4)

    def text() -> str:
        return "".join(rng.choice(WORDS) + rng.choice((" ", ", ", "_", " - ")) for _ in range(12))

    excluded = [text() for _ in range(30)]
    overlap = Overlap([str(write_jsonl(tmp_path / "test.jsonl", excluded))], 4)
    found = 0
    for _ in range(300):
        document = text()
        expected = any(plainly_shared(document, each, 4) for each in excluded)
        assert overlap.shared_by(document) == expected
        found += expected
    assert 20 < found < 280


def test_a_corpus_leaves_them_out_and_says_so(tokenizer_folder, tmp_path):
    folder = write_task(tmp_path / "tasks", text=TEXT)
    texts = write_jsonl(tmp_path / "texts.jsonl", ["a first document", SHARED, "a last document"])
    manifest = build([texts], tmp_path / "corpus", tokenizer_folder, exclude=(str(folder),), exclude_words=8)
    assert (manifest.documents, manifest.removed["excluded"]) == (2, 1)
    options = read_manifest(str(tmp_path / "corpus")).options
    assert options["exclude_words"] == 8
    other = Overlap([str(folder)], 8).identity()
    assert options["exclude_sha256"] == other["exclude_sha256"]
    assert Overlap([str(folder)], 7).identity() != other


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("test.jsonl", b'{"text": ', "line 1: "),
        ("test.jsonl.gz", b"no gzip", "cannot read"),
        ("test.csv", b"a,b", "must end in"),
        ("test.txt", b"too short", "no text of 13 words"),
        ("test.txt", b"\xff\xfe", "cannot read"),
    ],
)
def test_files_that_are_none_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DetourError, match=message):
        Overlap([str(tmp_path / name)], 13)


def test_a_folder_without_test_files_is_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": string.ascii_letters}))
    with pytest.raises(DetourError, match="no file named test"):
        Overlap([str(tmp_path)], 13)
