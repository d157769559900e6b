"""The corpus builder's benchmark: every contender does the whole work, and nothing here is timed."""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import preprocess, texts
from benchmarks.builders import BUILDERS, NEEDS
from benchmarks.preprocess import Settings, Timed, compare_ids, measure, table
from benchmarks.texts import Slice, link_many, write_texts
from megatron_detour.errors import DetourError
from tests.conftest import write_jsonl

pytestmark = pytest.mark.integration

CONTENDERS = ("ours", "engine", "encode_batch", "datasets")


@pytest.fixture(autouse=True)
def however_short(monkeypatch):
    """So little text may be hidden by the start-up; then the rates are wrong, but still there."""
    monkeypatch.setattr(preprocess.Timed, "rates", lambda self: [1 / seconds for seconds in self.seconds])


def test_all_contenders_do_the_same_work(tokenizer_folder, tmp_path):
    settings = Settings(str(tokenizer_folder), megabytes=0.3, peer_megabytes=0.1, contenders=CONTENDERS, rounds=1)
    said = []
    result = measure(replace(settings, memory=(0.0006,), scratch=str(tmp_path)), said.append)
    rows = {row["name"]: row for row in result["contenders"]}
    assert tuple(rows) == CONTENDERS
    assert "same ids in the first" in said[1] and all(name in said[1] for name in CONTENDERS)
    assert rows["encode_batch"]["tokens"] == rows["datasets"]["tokens"] < rows["ours"]["tokens"]
    assert rows["engine"]["tokens"] == rows["ours"]["tokens"]
    assert rows["ours"]["documents"] == result["documents"]
    assert all(row["mb_per_second"] > 0 and row["mtokens_per_second"] > 0 for row in rows.values())
    assert (rows["encode_batch"]["times"], rows["engine"]["share_of_engine"]) == (1.0, 1.0)
    (memory,) = result["memory"]
    assert memory["bytes"] == pytest.approx(0.6e6, rel=0.1)
    assert min(memory["worker"], memory["parent"]) > 1e6
    lines = table(result).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:6]] == [f"| {name}" for name in CONTENDERS]
    assert len({line.count("|") for line in lines[:6]}) == 1
    assert json.loads(json.dumps(result)) == result | {"settings": json.loads(json.dumps(result["settings"]))}
    assert list(tmp_path.iterdir()) == []


def test_workers_have_their_own_table_and_a_missing_peer_a_row(tokenizer_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(NEEDS, "datatrove", "no_such_package")
    settings = Settings(str(tokenizer_folder), megabytes=0.05, contenders=("datatrove",), workers=(1, 2), rounds=1)
    result = measure(replace(settings, peer_python=sys.executable, scratch=str(tmp_path)), lambda line: None)
    assert result["contenders"] == [{"name": "datatrove", "missing": "no_such_package"}]
    assert "| datatrove | not installed |" in table(result)
    assert [row["workers"] for row in result["workers"]] == [1, 2]
    assert result["workers"][0]["times"] == 1.0


def test_the_start_up_is_taken_off_and_too_little_text_is_told(monkeypatch):
    monkeypatch.undo()
    one = Timed("a", {}, "", Slice(Path(), 1, bytes=20_000_000), Slice(Path(), 1), None, "wall")
    one.seconds, one.start_up = [3.0, 5.0, 4.0], [1.1, 1.0, 0.9]
    assert one.rates() == [10.0, 5.0, 20 / 3]
    one.seconds = [1.05, 3.0, 3.0]
    assert one.rates() is None


def test_nobody_is_fast_by_being_wrong():
    good = [[1, 2], [3]]
    compare_ids({"a": good, "b": good}, "a", np.array_equal)
    with pytest.raises(DetourError, match="b: its ids of document 2 differ from those of a"):
        compare_ids({"a": good, "b": [[1, 2], [4]]}, "a", np.array_equal)
    with pytest.raises(DetourError, match="b: wrote 1 documents, but a wrote 2"):
        compare_ids({"a": good, "b": good[:1]}, "a", np.array_equal)


def test_slices_are_beginnings_of_the_same_texts_and_input_is_repeated(tmp_path):
    source = write_jsonl(tmp_path / "source.jsonl", [f"été {number}" for number in range(100)])
    made = write_texts(tmp_path, (str(source),), "text", 0.002, 0.0005, seed=0)
    lines = [each.path.read_text(encoding="utf-8").splitlines() for each in made.slices()]
    whole = [json.loads(line)["text"] for line in lines[0]]
    assert made.passes == 3 and whole[:3] == ["été 0", "été 1", "été 2"] == whole[100:103]
    assert all(lines[0][: len(some)] == some for some in lines)
    assert [len(some) for some in lines] == [each.documents for each in made.slices()]
    assert made.whole.bytes == sum(len(text.encode()) for text in whole) >= 2000
    assert 500 <= made.peers.bytes < 510 and made.one.documents == 1
    links, size = link_many(made.whole, tmp_path, 10 * made.whole.bytes / 1e9)
    assert (len(list(links.iterdir())), size) == (10, 10 * made.whole.bytes)


def test_invented_texts_are_the_same_for_a_seed_and_never_run_out_of_words():
    def words(seed: int) -> list[str]:
        documents = texts.invented(seed)
        return " ".join(next(documents) for _ in range(50)).lower().replace(".", "").split()

    first = words(1)
    assert first == words(1) != words(2)
    counts = sorted((first.count(word) for word in set(first)), reverse=True)
    assert counts[0] / len(first) > 0.1 and statistics.median(counts) <= 2


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"megabytes": 0}, "--megabytes: must be above 0"),
        ({"rounds": 0}, "--rounds: must be above 0"),
        ({"workers": (1, 0)}, "--workers: must be above 0, not 0"),
        ({"scratch": "nowhere"}, "--scratch: no such folder: nowhere"),
        ({"input": ("nowhere.jsonl",)}, "nowhere.jsonl: no such input file"),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_sentence(changes, told):
    with pytest.raises(DetourError, match=told):
        measure(replace(Settings("nowhere"), **changes), lambda line: None)


def test_an_input_without_texts_and_a_failing_builder_are_told(tokenizer_folder, tmp_path, monkeypatch):
    empty = write_jsonl(tmp_path / "empty.jsonl", [" "])
    with pytest.raises(DetourError, match="no document has a text under 'text'"):
        measure(Settings(str(tokenizer_folder), (str(empty),)), lambda line: None)
    assert set(NEEDS) < set(BUILDERS)
    with pytest.raises(DetourError, match="encode_batch: failed in "):
        preprocess.run_builder(
            sys.executable,
            {"builder": "encode_batch", "scratch": str(tmp_path), "tokenizer": "nowhere", "input": ["x"], "show": 0},
            None,
        )
