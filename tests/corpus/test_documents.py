"""Reading documents: every record is a document, empty or a reject with its reason, in whatever shard it lies."""

from __future__ import annotations

import errno
import gzip
import json
import os
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from megatron_detour.corpus import documents, lines, sources
from megatron_detour.corpus.documents import Block, read_documents, read_shard, records_before
from megatron_detour.corpus.records import TextKeys
from megatron_detour.corpus.sources import HubDataset, find_inputs, plan_parts, plan_shards
from megatron_detour.errors import DetourError

LINES = b"one\n\ntwo two two two two\r\n" + b"x" * 250 + b"\n\xef\xbb\xbf in the middle\nlast"
TEXTS = [f"text {i} œ " + "y" * (i % 7) for i in range(1_000)]


def read(path: Path | str, keys: TextKeys | None = None, **options) -> list[Block]:
    shards = plan_shards(find_inputs([str(path)])[0], **options)
    return [block for shard in shards for block in read_shard(shard, keys or TextKeys())]


def texts_of(blocks: list[Block]) -> list[str]:
    return [text for block in blocks for text in block.texts]


def zstandard(content: bytes) -> bytes:
    return pyarrow.compress(content, "zstd", asbytes=True)


@pytest.mark.parametrize("block", [7, 64, 1 << 20])
@pytest.mark.parametrize("stride", [1, 4, 5, 7, 100, 1 << 20])  # lines begin at bytes 4 and 5
def test_every_line_belongs_to_one_shard(tmp_path, monkeypatch, stride, block):
    path = tmp_path / "a.txt"
    path.write_bytes(LINES)
    monkeypatch.setattr(sources, "SHARD_BYTES", stride)
    monkeypatch.setattr(lines, "BLOCK_BYTES", block)
    blocks = read(path)
    expected = LINES.decode().replace("\r\n", "\n").split("\n")
    assert texts_of(blocks) == [line for line in expected if line]
    assert sum(block.records for block in blocks) == len(expected)
    assert sum(block.empty for block in blocks) == 1


@pytest.mark.parametrize("stride", [1, 64, 65, 300, 1_000, 1 << 20])
def test_a_bad_line_is_named_in_whatever_shard(tmp_path, monkeypatch, stride):
    """Each line in turn is bad; the number told is its own, wherever the shards begin."""
    monkeypatch.setattr(sources, "SHARD_BYTES", stride)
    path = tmp_path / "a.jsonl"
    for bad in range(1, 13):
        lines = [json.dumps({"text": "x" * (17 * i)}).encode() for i in range(1, 13)]
        lines[bad - 1] = b"oops"
        path.write_bytes(b"\n".join(lines))
        found = [
            records_before(shard) + record + 1
            for shard in plan_shards([str(path)])
            for block in read_shard(shard, TextKeys())
            for record, _ in block.rejects
        ]
        assert found == [bad]


BAD_LINES = {
    "invalid JSON": (b"{'text': 'x'}", "invalid JSON"),
    "deep": (b"[" * 200_000, "invalid JSON"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "invalid JSON"),
    "no object": (b'["text"]', "not a JSON object such as"),
    "no key": (b'{"txet": "x"}', "no key 'text'"),
    "an object": (
        b'{"text": {"a": "x", "b": "y"}}',
        "the value of 'text' is an object; use --text-key text.NAME for the text under NAME in it",
    ),
    "a usual key": (b'{"Jane Doe": 1, "note": {"text": "x"}}', "no key 'text' (there is 'note'); set --text-key to"),
    "twice": (b'{"text": "a", "text": "b"}', "duplicate key 'text'"),
    "twice, with spaces": (b'{"text" : "a", "n": 1, "text" :"b"}', "duplicate key 'text'"),
    "null": (b'{"text": null}', "the value of 'text' is null"),
    "no text": (b'{"text": ["x"]}', "the value of 'text' is not a string"),
    "half a surrogate pair": (b'{"text": "x \\ud83e"}', "contains a lone surrogate"),
    "surrogates the wrong way round": (b'{"text": "\\udd20\\ud83e"}', "contains a lone surrogate"),
    "not UTF-8": (b'{"text": "caf\xe9"}', "not UTF-8"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_no_document_and_its_neighbours_are(tmp_path, case):
    line, why = BAD_LINES[case]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
    (block,) = read(path)
    assert block.texts == ["before", "after"]
    ((number, reason),) = block.rejects
    assert number == 1
    assert why in reason


@pytest.mark.parametrize("beside", [b"", b"\noops"], ids=["alone", "beside a bad line"])
@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'{"n": 1, "n": 2, "text": "a"}', "a"),
        (b'{"text": "a", "type": "text", "of": {"text": "b"}, "quoted": "\\"text\\": 1, \\"text\\": 2"}', "a"),
        (b'{"n": NaN, "text": "a"}', "a"),
        (b'{"n": "\xff", "text": "a"}', "a"),
        (b' {"text": "\\ud83d\\ude00 \\u0000"}\r', "😀 \x00"),
        (b'{"text": "a", "n": ' + b"1" * 5_000 + b"}", "a"),
        (b'{"text": "a", "deep": ' + b"[" * 300 + b"]" * 300 + b"}", "a"),
    ],
    ids=[
        "equal keys that are not read",
        "the key elsewhere",
        "NaN",
        "not UTF-8 in another field",
        "escapes",
        "a number of 5,000 digits",
        "deep",
    ],
)
def test_odd_lines_that_are_documents(tmp_path, line, text, beside):
    """What a line is does not depend on whether its neighbours are good."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(line + beside + b"\n")
    (block,) = read(path)
    assert block.texts == [text]
    assert len(block.rejects) == bool(beside)


DOTTED = [
    ({"a.b": "x"}, "a.b", "x"),
    ({"a": {"b": "x"}}, "a.b", "x"),
    ({"a": {"b": "inside"}, "a.b": "spelled"}, "a.b", "spelled"),
    ({"a": "no object", "a.b": "x"}, "a.b", "x"),
    ({"a": {"b.c": "x"}}, "a.b.c", "x"),
    ({"a.b": {"c": "x"}}, "a.b.c", "x"),
    ({"a": {"b": {"other": 1}}, "a.b": {"c": "x"}}, "a.b.c", "x"),
    ({"a": {"b": {"c": "x"}, "b.c": "spelled"}}, "a.b.c", "spelled"),
]


@pytest.mark.parametrize("beside", [b"", b"oops\n"], ids=["alone", "beside a bad line"])
@pytest.mark.parametrize(("record", "key", "text"), DOTTED)
def test_a_key_with_a_dot_is_taken_as_it_is_spelled_or_as_a_way_inside(tmp_path, record, key, text, beside):
    (tmp_path / "a.jsonl").write_bytes(beside + json.dumps(record).encode() + b"\n")
    (block,) = read(tmp_path / "a.jsonl", TextKeys((key,)))
    assert block.texts == [text]
    (block,) = read(tmp_path / "a.jsonl", TextKeys((key, key), "|"))
    assert block.texts == [f"{text}|{text}"]
    (tmp_path / "b.jsonl").write_bytes(beside + json.dumps(record).encode()[:-1] + b', "a": 1, "a": 2}\n')
    (block,) = read(tmp_path / "b.jsonl", TextKeys((key,)))
    assert (block.texts, block.rejects[-1][1]) == ([], "duplicate key 'a'")
    if "no object" not in record.values():
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "a.parquet")
        (block,) = read(tmp_path / "a.parquet", TextKeys((key,)))
        assert block.texts == [text]


@pytest.mark.parametrize(
    "bad", [{"x": 1}, {"text": {}}, {"text": 1}, {"text": None}, {"text": [1]}, {"text": "\ud800"}, [1], "x"]
)
def test_nothing_of_a_record_is_told_but_its_place(tmp_path, bad):
    """Keys may be names of patients, and there may be a million of them."""
    secret = {f"Jane Doe {i}": {"Jane Doe": "Jane Doe"} for i in range(10_000)}
    inside = {"text": secret} if bad == {"text": {}} else {}
    bad = bad | secret | inside if isinstance(bad, dict) else [bad, secret]
    (tmp_path / "a.jsonl").write_text(json.dumps(bad) + "\n" + json.dumps(bad)[:-1])
    reasons = [reason for block in read(tmp_path / "a.jsonl") for _, reason in block.rejects]
    assert len(reasons) == 2
    assert all("Jane" not in reason and len(reason) < 120 for reason in reasons)


def test_a_file_of_line_ends_is_read_as_fast_as_they_are(tmp_path, monkeypatch):
    """No call for each empty line, whatever stands beside them."""
    taken = []
    real = Block.add
    monkeypatch.setattr(Block, "add", lambda *given: (taken.append(given), real(*given)))
    for name, line in (("a.txt.gz", b"text"), ("a.jsonl.gz", b'{"text": "text"}'), ("b.jsonl.gz", b"oops")):
        (tmp_path / name).write_bytes(gzip.compress(b"\n" * 3_000_000 + line + b"\n" * 3_000_000))
        blocks = read(tmp_path / name)
        assert texts_of(blocks) == (["text"] if line != b"oops" else [])
        assert sum(block.records for block in blocks) == 6_000_000
        assert sum(block.empty for block in blocks) == 5_999_999
        assert [number for block in blocks for number, _ in block.rejects] == ([3_000_000] if line == b"oops" else [])
    assert len(taken) <= 1


@pytest.mark.parametrize(
    "lines", [(b'{"n": ', b'{}, "text": "c"}'), (b'{"n": {}', b', "text": "c"}'), (b"", b'{"text": "c"}')]
)
def test_two_records_on_a_line_do_not_make_up_for_one_on_two(tmp_path, lines):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([b'{"text": "a"}{"text": "b"}', *lines]) + b"\n")
    (block,) = read(path)
    assert block.records == 3
    assert block.texts == (["c"] if not lines[0] else [])
    assert [number for number, _ in block.rejects] == ([0] if not lines[0] else [0, 1, 2])


def test_a_line_without_end_is_passed_over_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 1_000)
    monkeypatch.setattr(lines, "BLOCK_BYTES", 64)
    monkeypatch.setattr(sources, "SHARD_BYTES", 700)
    content = b"a\n" + b"x" * 5_000 + b"\nb\n" + b"y" * 1_000 + b"\n" + b"z" * 3_000
    for name, whole in (("a.txt", content), ("a.txt.gz", gzip.compress(content))):
        (tmp_path / name).write_bytes(whole)
        blocks = read(tmp_path / name)
        assert texts_of(blocks) == ["a", "b", "y" * 1_000]
        reasons = [reason for block in blocks for _, reason in block.rejects]
        assert [reason.split(" 256")[0] for reason in reasons] == ["longer than"] * 2


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name, content in (("a.jsonl", b'{"text": "x"}'), ("a.txt", b"x")):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content + b"\n")
        assert texts_of(read(tmp_path / name)) == ["x"]
    assert texts_of(read(tmp_path / "a.txt", whole_files=True)) == ["x\n"]


KINDS = {
    "a.jsonl": lambda path: path.write_bytes(jsonl(TEXTS)),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(jsonl(TEXTS[:400])) + gzip.compress(jsonl(TEXTS[400:]))),
    "a.jsonl.zst": lambda path: path.write_bytes(zstandard(jsonl(TEXTS[:400])) + zstandard(jsonl(TEXTS[400:]))),
    "a.txt": lambda path: path.write_text("\n".join(TEXTS), encoding="utf-8"),
    "a.txt.zst": lambda path: path.write_bytes(zstandard("\n".join(TEXTS).encode())),
    "a.parquet": lambda path: pyarrow.parquet.write_table(table(TEXTS), path, row_group_size=130),
    "saved": lambda path: datasets.Dataset.from_dict({"n": [0] * len(TEXTS), "text": TEXTS}).save_to_disk(path),
}


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()


def table(texts: list[str | None]) -> pyarrow.Table:
    return pyarrow.table({"n": [0] * len(texts), "text": texts})


@pytest.mark.parametrize("stride", [900, 1 << 25])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_documents(tmp_path, monkeypatch, kind, stride):
    monkeypatch.setattr(sources, "SHARD_BYTES", stride)
    KINDS[kind](tmp_path / kind)
    blocks = read(tmp_path / kind)
    assert texts_of(blocks) == TEXTS
    assert sum(block.records for block in blocks) == len(TEXTS)
    if kind in ("a.jsonl", "a.parquet", "saved"):
        assert (len(plan_shards([str(tmp_path / kind)])) > 1) == (stride == 900)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_that_load_dataset_opens(tmp_path, monkeypatch, streaming):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for number in range(3):
        share = TEXTS[number::3]
        pyarrow.parquet.write_table(table(share), tmp_path / f"train-{number}.parquet")
    dataset = HubDataset(str(tmp_path), streaming=streaming)
    shards = plan_shards([], dataset=dataset)
    found = [t for shard in shards for block in read_shard(shard, TextKeys()) for t in block.texts]
    assert found == TEXTS[0::3] + TEXTS[1::3] + TEXTS[2::3]
    assert len(shards) == len(plan_parts(shards, "")) == (3 if streaming else 1)
    with pytest.raises(DetourError, match="cannot open this dataset"):
        plan_shards([], dataset=HubDataset(str(tmp_path / "none"), streaming=streaming))


def test_rows_without_text_are_rejected(tmp_path):
    pyarrow.parquet.write_table(table(["a", None, "b", " "]), tmp_path / "a.parquet")
    (block,) = read(tmp_path / "a.parquet")
    assert (block.texts, block.empty, block.rejects) == (["a", "b"], 1, [(1, "the value of 'text' is null")])
    (block,) = read(tmp_path / "a.parquet", TextKeys(("body",)))
    assert [number for number, _ in block.rejects] == [0, 1, 2, 3]
    assert "no key 'body'" in block.rejects[0][1]


@pytest.mark.parametrize("kind", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize(
    ("keys", "text"),
    [(("title", "text"), "T|A"), (("parts.body",), "B"), (("parts.head.name", "text"), "N|A")],
)
def test_nested_and_several_keys(tmp_path, kind, keys, text):
    record = {"title": "T", "text": "A", "parts": {"body": "B", "head": {"name": "N"}}}
    if kind == "a.jsonl":
        (tmp_path / kind).write_text(json.dumps(record) + '\n{"title": "T"}\n')
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record, {"title": "T"}]), tmp_path / kind)
    (block,) = read(tmp_path / kind, TextKeys(keys, "|"))
    assert block.texts == [text]
    assert [number for number, _ in block.rejects] == [1]


def test_folders_globs_and_whole_files(tmp_path):
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "deep/er/b.txt").write_text("one\ntwo\n")
    (tmp_path / "deep/a.txt").write_text("three\n\nfour")
    (tmp_path / "deep/readme.md").write_text("no document")
    assert texts_of(read(tmp_path)) == ["three", "four", "one", "two"]
    assert texts_of(read(f"{tmp_path}/**/*.txt")) == ["three", "four", "one", "two"]
    assert texts_of(read(tmp_path, whole_files=True)) == ["three\n\nfour", "one\ntwo\n"]
    (tmp_path / "deep/c.txt.gz").write_bytes(gzip.compress(b"five\nsix"))
    assert texts_of(read(tmp_path, whole_files=True))[1:2] == ["five\nsix"]
    for names, says in (
        ([f"{tmp_path}/*.jsonl"], "no input file matches"),
        ([f"{tmp_path}/deep/readme.md"], "input files must end in"),
        ([f"{tmp_path}/deep/*.md"], "no file ends in"),
        ([str(tmp_path / "deep"), str(tmp_path / "deep/a.txt")], "a.txt: this input is given twice"),
    ):
        with pytest.raises(DetourError, match=says):
            find_inputs(names)


def test_links_are_followed_and_others_are_told(tmp_path):
    """A folder behind a link is read, also one that leads back; the same file by another name is refused."""
    (tmp_path / "in/.hidden").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for name in ("in/a.txt", "in/b.TXT", "in/c.jsonl.xz", "in/.hidden/d.txt", "in/out.rejects.jsonl", "other/e.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "in/link").symlink_to(tmp_path / "other")
    (tmp_path / "in/back").symlink_to(tmp_path / "in")
    found, others = find_inputs([str(tmp_path / "in")], (tmp_path / "in/out.rejects.jsonl",))
    assert [Path(path).name for path in found] == ["a.txt", "e.txt"]
    assert [Path(path).name for path in others] == ["b.TXT", "c.jsonl.xz"]
    assert find_inputs([f"{tmp_path}/in/**"], (tmp_path / "in/out.rejects.jsonl",))[0] == found
    (tmp_path / "in/again.txt").symlink_to(tmp_path / "in/a.txt")
    assert find_inputs([str(tmp_path / "in")], (tmp_path / "in/out.rejects.jsonl",))[0] == found
    with pytest.raises(DetourError, match=r"a\.txt: this input is given twice"):
        find_inputs([str(tmp_path / "in"), str(tmp_path / "in/again.txt")])


def test_the_last_ending_tells_the_kind(tmp_path):
    (tmp_path / "a.jsonl.txt").write_text("{plain")
    (tmp_path / "b.txt.jsonl").write_text('{"text": "x"}')
    assert texts_of(read(tmp_path, whole_files=True)) == ["{plain", "x"]
    assert texts_of(read(tmp_path)) == ["{plain", "x"]


def test_a_damaged_text_in_parquet_is_one_reject(tmp_path):
    texts = pyarrow.array([b"good", b"caf\xe9", b"fine"], pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), 3, texts.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    (block,) = read(tmp_path / "a.parquet")
    assert (block.texts, block.rejects) == (["good", "fine"], [(1, "not UTF-8")])


@pytest.mark.parametrize("kind", ["a.parquet", "saved", "streamed"])
def test_large_texts_are_not_read_many_at_once(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(documents, "ROW_BYTES", 10_000)
    texts = [f"{number} " + "y" * 4_000 for number in range(60)] + ["short"] * 600
    if kind == "saved":
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved")
        blocks = read(tmp_path / "saved")
    else:
        pyarrow.parquet.write_table(table(texts), tmp_path / "a.parquet", row_group_size=60)
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
        chosen = HubDataset(str(tmp_path), streaming=True) if kind == "streamed" else None
        shards = plan_shards([] if chosen else [str(tmp_path / "a.parquet")], dataset=chosen)
        blocks = [block for shard in shards for block in read_shard(shard, TextKeys())]
    assert texts_of(blocks) == texts
    assert max(sum(map(len, block.texts)) for block in blocks) < 10_000 + 4_100
    assert max(block.records for block in blocks) == documents.ROWS


def test_a_saved_dataset_of_splits_needs_a_split(tmp_path):
    of = datasets.Dataset.from_dict
    datasets.DatasetDict({"a": of({"text": ["x"]}), "b": of({"text": ["y"]})}).save_to_disk(tmp_path / "d")
    assert texts_of(read(tmp_path / "d", split="b")) == ["y"]
    with pytest.raises(DetourError, match=r"choose one with --split a\|b"):
        read(tmp_path / "d", split="train")


@pytest.mark.parametrize("splits", [["../out"], ["/etc"], [".."], [""], ["a", None], "a", {"a": 1}, None, [["a"]]])
def test_a_saved_dataset_names_only_what_lies_in_it(tmp_path, splits):
    datasets.Dataset.from_dict({"text": ["secret"]}).save_to_disk(tmp_path / "out")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/dataset_dict.json").write_text(json.dumps({"splits": splits}))
    with pytest.raises(DetourError, match=r"dataset_dict\.json: splits must be a list of names"):
        read(tmp_path / "d", split="../out")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff", b"null", b"[" * 100_000, b'{"splits": [], "splits": ["a"]}', b'{"splits": ["a"]}'],
)
@pytest.mark.parametrize("name", ["dataset_dict.json", "state.json"])
def test_a_damaged_saved_dataset_is_one_sentence(tmp_path, name, content):
    datasets.DatasetDict({"a": datasets.Dataset.from_dict({"text": ["x"]})}).save_to_disk(tmp_path / "d")
    (tmp_path / "d" / name).write_bytes(content)
    if name == "dataset_dict.json" and content.startswith(b'{"splits": ["a"]'):
        (tmp_path / "d/a/state.json").unlink()
    with pytest.raises(DetourError) as caught:
        read(tmp_path / "d", split="a")
    assert str(tmp_path / "d") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_saved_dataset_whose_files_lie_elsewhere_is_refused(tmp_path):
    datasets.Dataset.from_dict({"text": ["x"]}).save_to_disk(tmp_path / "d")
    state = json.loads((tmp_path / "d/state.json").read_text())
    state["_data_files"] = [{"filename": "../other/data.arrow"}]
    (tmp_path / "d/state.json").write_text(json.dumps(state))
    with pytest.raises(DetourError, match=r"state\.json: _data_files must be a list of adjacent files"):
        read(tmp_path / "d")


def test_a_folder_that_cannot_be_listed_is_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "in/a.txt").write_text("x")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("deep"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DetourError, match=r"in/deep: cannot be read: Stale file handle"):
        find_inputs([str(tmp_path / "in")])


BROKEN = {
    "cut.txt.gz": gzip.compress(b"text\n" * 500)[:-20],
    "plain.txt.gz": b"text\n",
    "damaged.txt.gz": gzip.compress(b"")[:10] + b"\xff" * 40,
    "cut.txt.zst": zstandard(b"".join(b"text %d\n" % i for i in range(5_000)))[:-20],
    "plain.txt.zst": b"text\n" * 10,
    "plain.parquet": b"text\n" * 10,
    "empty.txt.gz": b"",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_ends_too_early_or_is_none(tmp_path, name):
    (tmp_path / name).write_bytes(BROKEN[name])
    with pytest.raises(DetourError, match=f"{name}: (cannot be read to its end|not a readable Parquet file)"):
        read(tmp_path / name)


def test_small_files_share_parts_and_a_changed_one_makes_another(tmp_path):
    for number in range(50):
        (tmp_path / f"{number:02d}.txt").write_text(f"text {number}")
    shards = plan_shards(find_inputs([str(tmp_path)])[0])
    (part,) = plan_parts(shards, "")
    assert part.shards == tuple(shards)
    assert plan_parts(shards, "")[0].key == part.key
    assert plan_parts(shards, "other options")[0].key != part.key
    (tmp_path / "07.txt").write_text("text X")
    assert plan_parts(plan_shards(find_inputs([str(tmp_path)])[0]), "")[0].key != part.key


def test_read_documents_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SHARD_BYTES", 30)
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["one", "two", " ", "three"]) + b"oops\n" + jsonl(["four"]))
    found = read_documents(path)
    assert [next(found) for _ in range(3)] == ["one", "two", "three"]
    with pytest.raises(DetourError, match=r"a\.jsonl, line 5: invalid JSON"):
        next(found)
