"""Building a corpus: the tokenizer's ids, the same bytes for any number of workers, and nothing after a failure."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from megatron_detour.corpus import sources
from megatron_detour.data.indexed import IndexedCorpus
from megatron_detour.data.manifest import read_manifest
from megatron_detour.errors import DetourError
from megatron_detour.tokenizer.vocabulary import Vocabulary, load_tokenizer
from tests.conftest import build, sentences, write_jsonl

ROOT = Path(__file__).parents[2]
SHARED = ROOT / "../shared/data"
ODD = ["naïve Œdème à 38,5 °C", "two\nlines\r\nand a tab\t.", "漢字 🧬", "  spaces around  ", "a", "[MASK] in text"]


@pytest.fixture
def prefix(tmp_path) -> Path:
    """Where a test builds; the folder holds nothing else."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out/c"


def texts_of(jsonl: Path) -> list[str]:
    return [json.loads(line)["text"] for line in jsonl.read_text(encoding="utf-8").splitlines()]


def ids_at(prefix: str | Path) -> list[list[int]]:
    corpus = IndexedCorpus(prefix)
    return [corpus.tokens(i).tolist() for i in range(len(corpus))]


def encoded(tokenizer_folder: Path, texts: list[str]) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in texts]


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def bytes_at(prefix: Path) -> list[bytes]:
    return [prefix.with_suffix(suffix).read_bytes() for suffix in (".bin", ".idx")]


def failure(inputs: list[Path], prefix: Path, tokenizer: Path, **options) -> str:
    """The sentence of a failing build, after which the folder is as it was before, but for finished parts."""
    before = {path.name: path.read_bytes() for path in prefix.parent.iterdir() if path.is_file()}
    with pytest.raises(DetourError) as caught:
        build(inputs, prefix, tokenizer, **options)
    assert {path.name: path.read_bytes() for path in prefix.parent.iterdir() if path.is_file()} == before
    return str(caught.value)


def test_ids_are_the_tokenizers_own(corpus):
    texts = texts_of(corpus.jsonl)
    ids = ids_at(corpus.prefix)
    assert ids == encoded(corpus.tokenizer, texts)
    assert len(ids) == 300
    assert max(map(len, ids)) > 128


def test_the_manifest_tells_the_numbers(corpus):
    manifest = read_manifest(corpus.prefix)
    ids = ids_at(corpus.prefix)
    assert (manifest.documents, manifest.tokens) == (len(ids), sum(map(len, ids)))
    assert (manifest.empty, manifest.rejects, manifest.records) == (0, 0, 300)
    facts = corpus.jsonl.stat()
    state = f"{facts.st_size} {facts.st_mtime_ns}"
    assert manifest.sources == [{"path": str(corpus.jsonl), "bytes": facts.st_size, "state": state}]
    for kind, facts in manifest.files.items():
        content = Path(f"{corpus.prefix}.{kind}").read_bytes()
        assert (facts["bytes"], facts["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert set(manifest.files) == {"bin", "idx"}
    vocabulary = Vocabulary.from_tokenizer(load_tokenizer(corpus.tokenizer))
    assert Vocabulary.from_dict(manifest.tokenizer) == vocabulary
    assert names_in(Path(corpus.prefix).parent) == {"texts.jsonl", "corpus.bin", "corpus.idx", "corpus.manifest.json"}


def test_kinds_of_files_and_empty_lines(tmp_path, prefix, tokenizer_folder):
    """.jsonl, .jsonl.gz and .txt, in the order given; blank lines and blank texts are counted and left out."""
    records = "".join(json.dumps({"body": text, "id": i}) + "\n" for i, text in enumerate(ODD))
    blank = "\n" + json.dumps({"body": "  \n "}) + "\n   \n"
    (tmp_path / "a.jsonl").write_bytes((records + blank).encode())
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(records.encode()) + gzip.compress(blank.encode()))
    (tmp_path / "c.txt").write_bytes("first line\r\n\r\n second one \nlast, without an end of line é".encode())
    inputs = [tmp_path / name for name in ("c.txt", "b.jsonl.gz", "a.jsonl")]
    manifest = build(inputs, prefix, tokenizer_folder, text_key=("body",))
    lines = ["first line", " second one ", "last, without an end of line é"]
    assert ids_at(prefix) == encoded(tokenizer_folder, lines + ODD + ODD)
    assert (manifest.documents, manifest.empty, manifest.rejects) == (3 + 2 * len(ODD), 1 + 3 + 3, 0)
    assert json.loads(json.dumps(dataclasses.asdict(manifest))) == dataclasses.asdict(read_manifest(prefix))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("mixed")
    rng = random.Random(3)
    texts = [sentences(rng, rng.randint(1, 6)) for _ in range(200)]
    write_jsonl(folder / "a.jsonl", texts[:120])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(write_jsonl(folder / "b", texts[120:160]).read_bytes()))
    (folder / "c.txt").write_text("\n".join(texts[160:]), encoding="utf-8")
    return [str(folder / name) for name in ("a.jsonl", "b.jsonl.gz", "c.txt")]


def test_the_bytes_depend_on_neither_workers_nor_parts(tmp_path, mixed, tokenizer_folder, monkeypatch):
    manifests = []
    for name, workers, stride in (("whole", 1, 1 << 25), ("one", 1, 3_001), ("three", 3, 3_001)):
        monkeypatch.setattr(sources, "SHARD_BYTES", stride)
        assert (len(sources.plan_shards(mixed)) > 10) == (stride == 3_001)
        manifests.append(build(mixed, tmp_path / name, tokenizer_folder, workers=workers))
    assert bytes_at(tmp_path / "whole") == bytes_at(tmp_path / "one") == bytes_at(tmp_path / "three")
    assert [(m.documents, m.tokens, m.files) for m in manifests] == [(200, manifests[0].tokens, manifests[0].files)] * 3


def test_rejects_stop_a_build_or_are_listed(tmp_path, prefix, tokenizer_folder, monkeypatch):
    good = [json.dumps({"text": text}).encode() for text in ODD * 4]
    bad = [b"{'text': 'x'}", b'{"text": null}', b'{"text": "caf\xe9"}']
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(good[:20] + bad + good[20:]) + b"\n")
    monkeypatch.setattr(sources, "SHARD_BYTES", 500)
    message = failure([path], prefix, tokenizer_folder)
    assert f"{path}, line 21: invalid JSON" in message
    assert "--max-rejects" in message
    assert failure([path], prefix, tokenizer_folder, max_rejects=2)
    manifest = build([path], prefix, tokenizer_folder, max_rejects=3)
    assert (manifest.records, manifest.documents, manifest.rejects) == (len(good) + 3, len(good), 3)
    assert ids_at(prefix) == encoded(tokenizer_folder, ODD * 4)
    listed = [json.loads(line) for line in Path(f"{prefix}.rejects.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(entry["file"], entry["line"]) for entry in listed] == [(str(path), number) for number in (21, 22, 23)]
    assert [entry["reason"][:8] for entry in listed] == ["invalid ", "the valu", "not UTF-"]
    build([mend(path, bad)], prefix, tokenizer_folder, overwrite=True)
    assert not Path(f"{prefix}.rejects.jsonl").exists()


def mend(path: Path, bad: list[bytes]) -> Path:
    path.write_bytes(b"\n".join(line for line in path.read_bytes().split(b"\n") if line not in bad))
    return path


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.jsonl", None, "no such input file"),
        ("a.csv", b"x\n", "input files must end in .jsonl, .jsonl.gz, .jsonl.zst, .txt"),
        ("a.jsonl", b"", "the input has no usable documents"),
        ("a.txt", b" \n\n", "the input has no usable documents"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "some text"}\n' * 50)[:-20], "cannot be read to its end"),
        ("plain.jsonl.gz", b'{"text": "x"}\n', "cannot be read to its end"),
        ("damaged.jsonl.gz", gzip.compress(b"")[:10] + b"\xff" * 40, "cannot be read to its end"),
    ],
    ids=["missing", "kind", "empty", "blank", "cut", "not compressed", "damaged"],
)
def test_inputs_that_cannot_be_built(tmp_path, prefix, tokenizer_folder, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    message = failure([tmp_path / name], prefix, tokenizer_folder)
    assert str(tmp_path / name if "no usable documents" not in says else prefix) in message
    assert says in message


def test_options_that_cannot_be(corpus, prefix, tmp_path):
    assert "--workers" in failure([corpus.jsonl], prefix, corpus.tokenizer, workers=0)
    assert "no tokenizer.json" in failure([corpus.jsonl], prefix, tmp_path)


def test_a_corpus_is_replaced_only_when_asked(tmp_path, prefix, tokenizer_folder):
    first, second, bad = (tmp_path / name for name in ("first.txt", "second.txt", "bad.jsonl"))
    first.write_text("one text\n", encoding="utf-8")
    second.write_text("another\nand one more\n", encoding="utf-8")
    bad.write_text("oops\n", encoding="utf-8")
    build([first], prefix, tokenizer_folder)
    assert names_in(prefix.parent) == {"c.bin", "c.idx", "c.manifest.json"}
    message = failure([second], prefix, tokenizer_folder)
    assert "c.manifest.json: already exists" in message
    assert "--overwrite" in message
    failure([bad], prefix, tokenizer_folder, overwrite=True)  # the old one stays, whole
    assert ids_at(prefix) == encoded(tokenizer_folder, ["one text"])
    assert build([second], prefix, tokenizer_folder, overwrite=True).documents == 2
    assert ids_at(prefix) == encoded(tokenizer_folder, ["another", "and one more"])
    assert read_manifest(prefix).documents == 2


def test_the_tool(tmp_path, prefix, tokenizer_folder):
    path = tmp_path / "a.txt"
    path.write_text("one text\n\nanother\n", encoding="utf-8")

    def run(*options: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", str(path)]
        command += ["--output-prefix", str(prefix), "--tokenizer", str(tokenizer_folder), *options]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    done = run()
    assert done.returncode == 0, done.stderr
    tokens = sum(map(len, encoded(tokenizer_folder, ["one text", "another"])))
    assert done.stdout.splitlines()[:2] == [f"{prefix}: 2 documents, {tokens} tokens", "left out: 1 empty"]
    made = prefix.with_suffix(".bin").stat().st_mtime_ns
    assert run().returncode == 0  # the same again is done already
    assert prefix.with_suffix(".bin").stat().st_mtime_ns == made
    other = run("--normalize", "NFC")
    assert other.returncode == 1
    assert f"\nerror: {prefix}.manifest.json: already exists" in other.stderr
    assert "Traceback" not in other.stderr


def copy_of(corpus, folder: Path) -> Path:
    for suffix in (".bin", ".idx", ".manifest.json"):
        (folder / f"c{suffix}").write_bytes(Path(f"{corpus.prefix}{suffix}").read_bytes())
    return folder / "c"


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("change", [-1, 2, None])
def test_a_damaged_corpus_is_refused(corpus, tmp_path, suffix, change):
    prefix = copy_of(corpus, tmp_path)
    file = prefix.with_suffix(suffix)
    size = file.stat().st_size
    if change is None:
        file.unlink()
    else:
        os.truncate(file, size + change)
    state = "missing" if change is None else f"{size + change:,} bytes instead of {size:,}"
    with pytest.raises(DetourError) as caught:
        read_manifest(prefix)
    assert str(caught.value) == f"{file}: {state}; rebuild the corpus with --overwrite"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such corpus; build it with megatron-detour preprocess"),
        (b"{", "invalid JSON"),
        (b"\xff", "invalid JSON"),
        (b"[]", "not a JSON object"),
        (b'{"format": 1}', "not a corpus manifest of format 2"),
        (b'{"format": 2, "documents": 3}', "missing keys: files, tokenizer, tokens"),
    ],
)
def test_a_damaged_manifest_is_refused(corpus, tmp_path, content, says):
    prefix = copy_of(corpus, tmp_path)
    path = Path(f"{prefix}.manifest.json")
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(DetourError, match=says) as caught:
        read_manifest(prefix)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is not there; the same is tested on generated text")
def test_real_text_and_modernberts_vocabulary(tmp_path, prefix):
    tokenizer = Tokenizer.from_file(str(SHARED / "tokenizers/modernbert_rebuilt.tokenizer.json"))
    source = next((SHARED / "corpora").glob("fr_biomed*heldout*.jsonl.gz"))
    with gzip.open(source, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    build([source], prefix, SHARED / "tokenizers/modernbert_rebuilt.tokenizer.json")
    assert ids_at(prefix) == [tokenizer.encode(text).ids for text in texts if text.strip()]


def reports(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:03d}.txt").write_text(f"Report {number}\n\nThe patient takes metformin.\nNo fever.\n")
    return folder


def test_a_folder_of_texts_is_asked_about_with_both_counts(tmp_path, prefix, tokenizer_folder):
    folder = reports(tmp_path / "in", 40)
    message = failure([folder], prefix, tokenizer_folder)
    assert "add --whole-files if each file is a document (40 documents)" in message
    assert "or --lines if each line is one (about 120)" in message
    assert message == failure(sorted(folder.iterdir()), prefix, tokenizer_folder)  # as a shell's * gives them
    assert build([folder], tmp_path / "lines", tokenizer_folder, lines=True).documents == 120
    whole = build([folder], tmp_path / "files", tokenizer_folder, whole_files=True)
    assert (whole.documents, whole.records) == (40, 40)
    assert "not both" in failure([folder], prefix, tokenizer_folder, lines=True, whole_files=True)


@pytest.mark.parametrize("flags", [{"held_out": 0.3, "deduplicate": "exact"}, {"deduplicate": "near"}])
def test_whole_files_go_with_parts_shards_and_resuming(tmp_path, tokenizer_folder, monkeypatch, flags):
    """Also with an equal file, which is one document too many, and a part for every few files."""
    folder = reports(tmp_path / "in", 40)
    (folder / "again.txt").write_text((folder / "007.txt").read_text())
    one = build([folder], tmp_path / "one", tokenizer_folder, whole_files=True, **flags)
    assert one.removed["duplicate"] >= 1
    assert one.documents + one.held_out + one.removed["duplicate"] == one.records == 41
    monkeypatch.setattr(sources, "SHARD_BYTES", 300)
    for index in (1, 0):
        shard = {"num_shards": 2, "shard_index": index}
        assert build([folder], tmp_path / "two", tokenizer_folder, whole_files=True, **flags, **shard) is None
    monkeypatch.setattr("megatron_detour.corpus.workers._run_here", None)  # nothing is left to do but to join
    build([folder], tmp_path / "two", tokenizer_folder, whole_files=True, **flags)
    for suffix in (".bin", ".idx", *((".heldout.bin",) if "held_out" in flags else ())):
        assert Path(f"{tmp_path}/one{suffix}").read_bytes() == Path(f"{tmp_path}/two{suffix}").read_bytes()


@pytest.mark.parametrize("count", [1, 3])
def test_texts_of_one_line_are_the_same_either_way(tmp_path, prefix, tokenizer_folder, capsys, count):
    (tmp_path / "in").mkdir()
    for number in range(count):
        (tmp_path / f"in/{number}.txt").write_text("The patient takes metformin.\n")
    assert build([tmp_path / "in"], prefix, tokenizer_folder).documents == count
    assert "--whole-files" not in capsys.readouterr().err


def test_a_single_text_file_is_read_line_by_line_and_says_so(tmp_path, prefix, tokenizer_folder, capsys):
    path = reports(tmp_path / "in", 1) / "000.txt"
    assert build([path], prefix, tokenizer_folder).documents == 3
    assert (
        f"{path}: each of about 3 lines is a document; with --whole-files the file is one document"
        in capsys.readouterr().err
    )


LATIN_1 = b"cr_\xe9t\xe9"


def test_names_that_are_not_utf_8_are_read_and_told(tmp_path, tokenizer_folder):
    """A file, one of no known kind, a bad record in one, and the corpus itself."""
    folder = os.fsencode(tmp_path) + b"/in_\xe9"
    Path(os.fsdecode(folder)).mkdir()
    for name, content in ((LATIN_1 + b".jsonl", b'{"text": "Some text."}\noops\n'), (LATIN_1 + b".doc", b"x")):
        Path(os.fsdecode(folder + b"/" + name)).write_bytes(content)
    output = os.fsencode(tmp_path) + b"/out_\xe9"
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), b"--input", folder, "--output-prefix", output]
    command += ["--tokenizer", str(tokenizer_folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr.count(b"\n")) == (1, 1)
    assert b"jsonl, line 2: invalid JSON" in done.stderr
    done = subprocess.run([*command, "--max-rejects", "1"], capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert b"1 documents" in done.stdout
    manifest = read_manifest(os.fsdecode(output))
    assert [Path(source["path"]).name for source in manifest.sources] == ["cr_\\xe9t\\xe9.jsonl"]
    assert [Path(path).name for path in manifest.passed_over] == ["cr_\\xe9t\\xe9.doc"]
    assert json.loads(Path(os.fsdecode(output + b".rejects.jsonl")).read_text())["file"].endswith("\\xe9.jsonl")
