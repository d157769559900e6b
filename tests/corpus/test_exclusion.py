"""--exclude: documents that share words in a row with a test text are left out, whatever its file looks like."""

from __future__ import annotations

import gzip
import json
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_detour.corpus import ngrams
from megatron_detour.corpus.exclusion import TEST_FILES, Exclusion, excluded_files, read_texts
from megatron_detour.corpus.ngrams import sequence_hashes
from megatron_detour.corpus.options import BuildOptions
from megatron_detour.data.manifest import read_manifest
from megatron_detour.errors import DetourError
from tests.conftest import build, sentences, write_jsonl
from tests.corpus.test_filters import texts_at

TEST = "One two three four five six seven eight nine ten eleven twelve thirteen fourteen."
TEXTS = st.lists(st.text(st.sampled_from("abAB é9_.-\n\u0301\xad"), max_size=60), min_size=1, max_size=8)


def exclusion(path, words: int = 3) -> Exclusion:
    return Exclusion.read((str(path),), words)


def sequences(text: str, n: int) -> set[tuple[str, ...]]:
    """The definition: letters and digits, without case and accents, for the characters of TEXTS."""
    plain = text.lower().replace("é", "e").replace("\u0301", "").replace("\xad", "")
    words = re.findall("[a-z0-9]+", plain)
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


@settings(deadline=None)
@given(TEXTS, TEXTS, st.integers(1, 4), st.integers(1, 40))
def test_texts_that_share_a_sequence_are_found(excluded, texts, n, piece):
    """As by the definition, and wherever a text is cut into pieces."""
    wanted = set().union(*(sequences(text, n) for text in excluded))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngrams, "PIECE", piece)
        found = [hashes for hashes, _ in sequence_hashes(excluded, n)]
        assert len(np.unique(np.concatenate(found or [np.zeros(0)]))) == len(wanted)
        if wanted:
            shared = Exclusion(np.unique(np.concatenate(found)), n).shared_by(texts)
            assert shared.tolist() == [bool(sequences(text, n) & wanted) for text in texts]


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("THREE, four;five", True),
        ("trois Fièvre\u00a0élevée", True),
        ("trois fie\u0300vre e\u0301leve\u0301e", True),
        ("TROIS FIEVRE ELEVEE", True),
        ("5 μg STRASSE", True),
        ("5 µg Straße", False),  # one letter for two
        ("ΟΔΟΣ οδος οδός", True),
        ("three_four_five", True),
        ("three four", False),
        ("three fourfive six", False),
        ("4 3 5", False),
    ],
)
def test_what_a_word_is(tmp_path, text, same):
    texts = ["Three four five", "trois fièvre élevée", "5 µg strasse", "οδος ΟΔΟΣ οδοσ", "3 4 5"]
    shared = exclusion(write_jsonl(tmp_path / "t.jsonl", texts)).shared_by(["other", text, "text"])
    assert shared.tolist() == [False, same, False]


def test_hashes_are_the_same_on_any_machine():
    """They are part of a corpus's identity."""
    [(hashes, owners)] = sequence_hashes(["Le patient a de la fièvre", "", "漢字 Ⅷ ٣"], 3)
    assert owners.tolist() == [0, 0, 0, 0, 2]
    assert hashes[[0, 4]].tolist() == [4439543947870229644, 5930481862796875730]


@pytest.mark.parametrize(
    "record",
    [
        {"text": TEST, "label": "x"},
        {"tokens": [*TEST[:-1].split(), "."], "tags": ["O"] * 15},
        {"question": "Which?", "options": {"a": "None", "b": TEST}, "score": 3.0},
        {"turns": [{"say": [TEST]}, None, 5]},
        [TEST],
        f"\ud800 {TEST}",
    ],
)
def test_records_of_any_shape(tmp_path, record):
    (tmp_path / "t.jsonl").write_text("\n" + json.dumps(record) + "\n\n")
    assert exclusion(tmp_path / "t.jsonl", 13).shared_by([f"So: {TEST}", TEST[9:]]).tolist() == [True, False]


def test_deeply_nested_records(tmp_path):
    (tmp_path / "t.jsonl").write_text("[" * 900 + json.dumps(TEST) + "]" * 900)
    assert TEST in read_texts(str(tmp_path / "t.jsonl"))


def test_folders_of_tasks(tmp_path):
    """Only files named test.*, also through links, compressed and plain."""
    for name in ("a/test.jsonl", "a/train.jsonl", "b/c/test.txt", "b/test.csv", "b/mytest.jsonl", ".d/test.jsonl"):
        (tmp_path / "tasks" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tasks" / name).write_text(json.dumps({"text": name}))
    (tmp_path / "tasks/b/test.json.gz").write_bytes(gzip.compress(json.dumps({"text": TEST}).encode()))
    (tmp_path / "tasks/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/test.jsonl").write_text("{}")
    found = excluded_files((str(tmp_path / "tasks"), str(tmp_path / "tasks/a/train.jsonl")))
    names = [name.removeprefix(f"{tmp_path}/tasks/") for name in found]
    assert names == ["a/test.jsonl", "b/c/test.txt", "b/test.json.gz", "link/test.jsonl", "a/train.jsonl"]
    assert read_texts(found[2]) == [TEST]


def test_a_text_file_is_one_text(tmp_path):
    (tmp_path / "t.txt").write_text("one two\nthree\n")
    assert exclusion(tmp_path / "t.txt").shared_by(["One, two, three", "one two"]).tolist() == [True, False]


def test_a_build_counts_and_identifies_what_it_excludes(tmp_path, tokenizer_folder):
    rng = random.Random(4)
    kept = [f"document {i}: {sentences(rng, 2)}" for i in range(40)]
    path = write_jsonl(tmp_path / "t.jsonl", [*kept[:20], f"Long ago. {TEST.upper()} The end.", *kept[20:], TEST])
    (tmp_path / "tasks/x").mkdir(parents=True)
    test = write_jsonl(tmp_path / "tasks/x/test.jsonl", ["too short", TEST])
    options = {"exclude": (str(tmp_path / "tasks"),), "held_out": 0.3}
    manifest = build([path], tmp_path / "c", tokenizer_folder, workers=2, **options)
    assert manifest.removed == {"excluded": 2}
    assert manifest.records == 42 == manifest.documents + manifest.held_out + 2
    texts = texts_at(tmp_path / "c", tokenizer_folder) + texts_at(tmp_path / "c.heldout", tokenizer_folder)
    assert sorted(texts) == sorted(kept)
    facts = {key: value for key, value in manifest.options.items() if key.startswith("exclude")}
    identity = facts.pop("exclude_sha256")
    assert facts == {"exclude": [str(tmp_path / "tasks")], "exclude_words": 13, "exclude_sequences": 2}

    # The sequences count, not the files: a copy under another name is the same, and another text or number is not.
    copy = write_jsonl(tmp_path / "copy.jsonl", [TEST, TEST])
    again = build([path], tmp_path / "c", tokenizer_folder, **options | {"exclude": (str(copy),)})
    assert (again.plan, again.created) == (manifest.plan, manifest.created)  # not built again
    for other in ({"exclude_words": 14}, {"exclude": ()}):
        with pytest.raises(DetourError, match="already exists"):
            build([path], tmp_path / "c", tokenizer_folder, **options | other)
    write_jsonl(test, [TEST, kept[3]])
    build([path], tmp_path / "c", tokenizer_folder, overwrite=True, **options)
    changed = read_manifest(tmp_path / "c")
    assert changed.removed == {"excluded": 3}
    assert changed.options["exclude_sha256"] != identity
    assert changed.plan != manifest.plan


def test_shards_exclude_too(tmp_path, tokenizer_folder):
    path = write_jsonl(tmp_path / "t.jsonl", [TEST, "another text"])
    options = {"exclude": (str(write_jsonl(tmp_path / "test.jsonl", [TEST])),)}
    for shard in range(2):
        build([path], tmp_path / "c", tokenizer_folder, num_shards=2, shard_index=shard, **options)
    assert build([path], tmp_path / "c", tokenizer_folder, **options).removed == {"excluded": 1}
    assert {file.name for file in tmp_path.iterdir() if file.name.startswith((".c", "c"))} == {
        "c.bin",
        "c.idx",
        "c.manifest.json",
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "missing.jsonl: no such file or folder"),
        ("t.csv", b"a", r"t.csv: files must end in \.jsonl, "),
        ("t.jsonl", b'{"a": "b"}\n{"a"', "t.jsonl, line 2: invalid JSON"),
        ("t.jsonl", b'{"a": "\xe9"}', "t.jsonl: not UTF-8"),
        ("t.jsonl.gz", b"no gzip", "t.jsonl.gz: cannot be read to its end"),
        ("t.txt", b"one two three", "t.txt: no text has 13 words; set a lower --exclude-words"),
        ("t.txt", b"", "t.txt: no text has 13 words"),
        ("folder/t.jsonl", b"{}", f"folder: no file below it is named {TEST_FILES[0]}"),
    ],
)
def test_faulty_files_stop_the_build(tmp_path, tokenizer_folder, name, content, message):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if content is not None:
        path.write_bytes(content)
    source = write_jsonl(tmp_path / "texts.jsonl", [TEST])
    excluded = path.parent if path.parent != tmp_path else path
    with pytest.raises(DetourError, match=message):
        build([source], tmp_path / "c", tokenizer_folder, exclude=(str(excluded),))
    assert not list(tmp_path.glob("*c*.bin")) and not list(tmp_path.glob(".c*"))


def test_the_number_of_words_needs_files():
    with pytest.raises(DetourError, match="--exclude-words: requires --exclude"):
        BuildOptions("c", "t", ("x",), exclude_words=8).check()
