"""Builds that are broken off, shared out or in each other's way: the same bytes in the end, or a sentence."""

from __future__ import annotations

import errno
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_detour.corpus import BuildOptions, publish, sources, worker, workers
from megatron_detour.corpus import build as corpus_build
from megatron_detour.corpus.journal import Journal
from megatron_detour.data.manifest import read_manifest
from megatron_detour.errors import DetourError
from tests.conftest import build, sentences, write_jsonl

ROOT = Path(__file__).parents[2]
STRETCH = 4_000
pytestmark = pytest.mark.integration
# A build of small parts in a process of its own, as a tool runs it; argv: prefix, tokenizer, input, flags.
SCRIPT = f"""
import sys
from megatron_detour.corpus import BuildOptions, build_corpus, sources
from megatron_detour.errors import command_line
from megatron_detour.settings import add_arguments, from_namespace
import argparse

sources.SHARD_BYTES = {STRETCH}
parser = argparse.ArgumentParser()
add_arguments(parser, BuildOptions)
if __name__ == "__main__":
    command_line(lambda: build_corpus(from_namespace(BuildOptions, parser.parse_args())) and None)
"""


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    rng = random.Random(11)
    lines = [sentences(rng, rng.randint(1, 5)) for _ in range(900)]
    return write_jsonl(tmp_path_factory.mktemp("texts") / "t.jsonl", lines + lines[:90])


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(sources, "SHARD_BYTES", STRETCH)


@pytest.fixture(scope="module")
def expected(texts, tokenizer_folder, tmp_path_factory) -> list[bytes]:
    """The bytes of a build that nothing disturbed, in one part."""
    prefix = tmp_path_factory.mktemp("unbroken") / "c"
    build([texts], prefix, tokenizer_folder)
    return contents(prefix)


def contents(prefix: Path, kinds: tuple[str, ...] = ("bin", "idx")) -> list[bytes]:
    return [Path(f"{prefix}.{kind}").read_bytes() for kind in kinds]


def start(folder: Path, texts: Path, tokenizer: Path, *flags: str) -> subprocess.Popen:
    script = folder / "build.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), "--input", str(texts), "--output-prefix", str(folder / "c")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, "--tokenizer", str(tokenizer), *flags],
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.default_int_handler
        ),  # a shell's background job ignores it
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_build_killed_again_and_again_ends_with_the_same_bytes(tmp_path, texts, tokenizer_folder, expected):
    """Kills at random moments after work has begun; no finished part is done twice, and no worker lives on."""
    rng = random.Random(12)
    kills = 0
    finished: dict[str, int] = {}
    journal = Journal(str(tmp_path / "c"))
    while kills < 4:
        process = start(tmp_path, texts, tokenizer_folder, "--workers", "2")
        known = len(list(journal.folder.glob("*.json")))
        while process.poll() is None and len(list(journal.folder.glob("*.json"))) <= known:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)  # the parent alone: its workers must notice
        process.wait()
        kills += 1
        assert not (tmp_path / "c.manifest.json").exists() or not journal.folder.exists()
        for file in journal.folder.glob("*.json"):
            made = file.stat().st_mtime_ns
            assert finished.setdefault(file.name, made) == made
    assert start(tmp_path, texts, tokenizer_folder).wait() == 0
    assert contents(tmp_path / "c") == expected
    assert not journal.folder.exists()
    assert kills >= 2


def test_a_build_goes_on_where_it_ended(tmp_path, texts, tokenizer_folder, expected, small_parts, monkeypatch):
    """Whatever part fails, and while parts are joined; the parts that are there are not built again."""
    built = []

    def count(parts, job, rejects):
        for part in parts:
            if len(built) == 7:
                raise KeyboardInterrupt
            built.append(part.key)
            rejects.add(part, worker.build_part(part, job, lambda read, made: None))

    monkeypatch.setattr(workers, "_run_here", count)
    with pytest.raises(KeyboardInterrupt):
        build([texts], tmp_path / "c", tokenizer_folder)
    built.append("go on")
    with monkeypatch.context() as broken:
        broken.setattr(corpus_build, "join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build([texts], tmp_path / "c", tokenizer_folder)
    parts = len(built)
    build([texts], tmp_path / "c", tokenizer_folder)
    assert len(built) == parts > 20  # only joined
    assert len(set(built)) == len(built)
    assert contents(tmp_path / "c") == expected


def test_other_options_make_other_parts(tmp_path, texts, tokenizer_folder, small_parts, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(corpus_build, "join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build([texts], tmp_path / "c", tokenizer_folder)
    manifest = build([texts], tmp_path / "c", tokenizer_folder, min_chars=100)
    assert manifest.removed["short"] > 0
    build([texts], tmp_path / "d", tokenizer_folder, min_chars=100)
    assert contents(tmp_path / "c") == contents(tmp_path / "d")


FULL = {"deduplicate": "near", "held_out": 0.2, "normalize": "NFC"}


def test_shards_and_ray_give_the_bytes_of_one_process(tmp_path, texts, tokenizer_folder, small_parts, monkeypatch):
    """Also with the options that look at the whole corpus."""
    files = ("bin", "idx", "heldout.bin", "heldout.idx")
    one = build([texts], tmp_path / "one", tokenizer_folder, **FULL)
    for index in (2, 0, 1):
        shard = build([texts], tmp_path / "three", tokenizer_folder, num_shards=3, shard_index=index, **FULL)
        assert shard is None
    assert not (tmp_path / "three.bin").exists()
    monkeypatch.setattr(workers, "_run_here", None)  # nothing is left to do but to join
    build([texts], tmp_path / "three", tokenizer_folder, **FULL)
    assert contents(tmp_path / "three", files) == contents(tmp_path / "one", files)
    build([texts], tmp_path / "ray", tokenizer_folder, engine_cluster="ray", workers=2, **FULL)
    assert contents(tmp_path / "ray", files) == contents(tmp_path / "one", files)
    assert one.held_out == read_manifest(tmp_path / "one.heldout").documents > 0


def test_two_builds_of_one_corpus_do_not_mix(tmp_path, texts, tokenizer_folder):
    journal = Journal(str(tmp_path / "c"))
    with journal.lock(None), pytest.raises(DetourError, match="another build of this corpus is running"):
        build([texts], tmp_path / "c", tokenizer_folder)
    with journal.lock(1):
        with pytest.raises(DetourError, match="lock-1 is locked"):
            build([texts], tmp_path / "c", tokenizer_folder, num_shards=2, shard_index=1)
        build([texts], tmp_path / "c", tokenizer_folder, num_shards=2, shard_index=0)
        with pytest.raises(DetourError, match="another build"):
            build([texts], tmp_path / "c", tokenizer_folder)
    build([texts], tmp_path / "c", tokenizer_folder)


def test_a_full_disk_is_one_sentence(tmp_path, texts, tokenizer_folder):
    """The limit on a file's size stands for a disk that fills up in a worker."""
    script = "ulimit -f 16; trap '' XFSZ; exec \"$@\""
    process = start(tmp_path, texts, tokenizer_folder)
    assert process.wait() == 0
    for file in tmp_path.glob("c.*"):
        file.unlink()
    command = ["bash", "-c", script, "-", *process.args]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert os.strerror(errno.EFBIG) in done.stderr
    assert not list(tmp_path.glob("c.*"))


def test_a_failing_part_ends_the_build_with_its_reason(tmp_path, texts, tokenizer_folder):
    """While other parts are running and waiting."""
    bad = tmp_path / "in"
    bad.mkdir()
    (bad / "a.jsonl").write_bytes(texts.read_bytes())
    (bad / "b.jsonl.gz").write_bytes(gzip.compress(texts.read_bytes())[:-30])
    (bad / "c.jsonl").write_bytes(texts.read_bytes())
    process = start(tmp_path, bad, tokenizer_folder, "--workers", "2")
    assert process.wait(timeout=60) == 1
    message = process.stderr.read()
    assert message.startswith(f"error: {bad}/b.jsonl.gz: cannot be read to its end: ")
    assert len(message.splitlines()) == 1
    assert not list(tmp_path.glob("c.*"))


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_build_says_so(tmp_path, texts, tokenizer_folder, sign):
    for times in (1, 4, 16, 64, 256):  # a build may be done when the signal comes: the next one has more to do
        folder = tmp_path / str(times)
        folder.mkdir()
        (folder / "t.jsonl").write_bytes(texts.read_bytes() * times)
        process = start(folder, folder / "t.jsonl", tokenizer_folder)
        while process.poll() is None and not list(folder.glob(".c.building/*.json")):
            time.sleep(0.002)
        process.send_signal(sign)
        if process.wait():
            break
    assert process.returncode == 130
    stopped = [line for line in process.stderr.read().splitlines() if "stopped" in line]
    assert stopped == [f"stopped; finished parts are kept in {folder}/.c.building, run the same command to resume"]


def test_a_place_without_files_is_told(tmp_path, texts, tokenizer_folder):
    with pytest.raises(DetourError, match="cannot create files there: Not a directory"):
        build([texts], texts / "c", tokenizer_folder)


def test_a_file_that_grows_before_the_first_part_is_refused(tmp_path, texts, tokenizer_folder, monkeypatch):
    path = tmp_path / "t.jsonl"
    path.write_bytes(texts.read_bytes())
    real = corpus_build.choose_engine

    def append_meanwhile(*arguments):
        with path.open("a") as file:
            file.write(json.dumps({"text": "more"}) + "\n")
        return real(*arguments)

    monkeypatch.setattr(corpus_build, "choose_engine", append_meanwhile)
    with pytest.raises(DetourError, match=r"t\.jsonl: changed during the build"):
        build([path], tmp_path / "c", tokenizer_folder)


def test_a_file_that_comes_to_a_folder_is_refused(tmp_path, texts, tokenizer_folder, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_bytes(texts.read_bytes())
    real = corpus_build.run_parts
    monkeypatch.setattr(
        corpus_build, "run_parts", lambda *given: (real(*given), (tmp_path / "in/b.jsonl").write_text('{"text": "x"}'))
    )
    with pytest.raises(DetourError, match="changed during the build"):
        build([tmp_path / "in"], tmp_path / "c", tokenizer_folder)


@pytest.mark.parametrize("name", ["bin", "length", "keys", "json"])
def test_a_part_that_is_not_whole_is_done_again(tmp_path, texts, tokenizer_folder, small_parts, monkeypatch, name):
    with monkeypatch.context() as broken:
        broken.setattr(corpus_build, "join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build([texts], tmp_path / "c", tokenizer_folder, deduplicate="exact")
    file = sorted((tmp_path / ".c.building").glob(f"*.{name}"))[3]
    os.truncate(file, file.stat().st_size // 2)
    build([texts], tmp_path / "c", tokenizer_folder, deduplicate="exact")
    build([texts], tmp_path / "d", tokenizer_folder, deduplicate="exact")
    assert contents(tmp_path / "c") == contents(tmp_path / "d")


ODD = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff",
    b"[" * 50_000,
    b'{"bytes": []}',
    b'{"bytes": {"../c": 1}}',
    b'{"removed": 3}',
    b"{}",
]
ODD += [b'{"records": [1], "rejects": [[9, 0, "x"]]}', b'{"plan": 1}', b'{"records": [1], "documents": 5, "bytes": {}}']


@pytest.mark.parametrize("content", ODD)
def test_a_damaged_entry_is_done_again_and_a_damaged_note_is_written_again(
    tmp_path, texts, tokenizer_folder, small_parts, monkeypatch, content
):
    with monkeypatch.context() as broken:
        broken.setattr(publish, "_rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build([texts], tmp_path / "c", tokenizer_folder)
    entry = min((tmp_path / ".c.building").glob("?" * 24 + ".json"))
    entry.write_bytes(content)
    note = tmp_path / ".c.building/publishing.json"
    plan = json.loads(note.read_text())["plan"]
    (tmp_path / "victim").write_text("kept")
    steps = [["corpus.bin", "../victim"]] if content == b"{}" else [["../victim", "c.bin"]]
    note.write_bytes(content if content != b"{}" else json.dumps({"plan": plan, "steps": steps}).encode())
    build([texts], tmp_path / "c", tokenizer_folder)
    assert (tmp_path / "victim").read_text() == "kept"
    build([texts], tmp_path / "d", tokenizer_folder)
    assert contents(tmp_path / "c") == contents(tmp_path / "d")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("step", range(7))
def test_a_build_broken_off_while_files_are_named(tmp_path, texts, tokenizer_folder, monkeypatch, step, overwrite):
    """Nothing that can be opened is mixed, and the same command goes on."""
    old = write_jsonl(tmp_path / "old.jsonl", [f"old {i}" for i in range(90)])
    options = {"held_out": 0.1, "max_rejects": 1, "overwrite": overwrite}
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(texts.read_bytes() + b"oops\n")
    if overwrite:
        build([old], tmp_path / "c", tokenizer_folder, held_out=0.1)
    real, done = Path.replace, []

    def replace(path, target):
        if path.parent.name == ".c.building" and Path(target).name.startswith("c."):
            if len(done) == step:
                raise KeyboardInterrupt
            done.append(target)
        return real(path, target)

    with monkeypatch.context() as broken:
        broken.setattr(Path, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            build([bad], tmp_path / "c", tokenizer_folder, **options)
    for name in ("c", "c.heldout"):
        with suppress(DetourError):
            assert read_manifest(tmp_path / name).rejects == 1
    monkeypatch.setattr(workers, "_run_here", None)  # all that is left to do is to name
    build([bad], tmp_path / "c", tokenizer_folder, **options)
    monkeypatch.undo()
    build([bad], tmp_path / "d", tokenizer_folder, held_out=0.1, max_rejects=1)
    files = ("bin", "idx", "heldout.bin", "heldout.idx", "rejects.jsonl")
    assert contents(tmp_path / "c", files) == contents(tmp_path / "d", files)
    assert len(done) == step
    assert not (tmp_path / ".c.building").exists()


def test_a_build_broken_off_before_the_first_name_leaves_nothing_of_the_old_one(
    tmp_path, texts, tokenizer_folder, monkeypatch
):
    build([texts], tmp_path / "c", tokenizer_folder, held_out=0.1)
    with monkeypatch.context() as broken:
        broken.setattr(publish, "_rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build([texts], tmp_path / "c", tokenizer_folder, overwrite=True)
    build([texts], tmp_path / "c", tokenizer_folder, overwrite=True)
    assert {path.name for path in tmp_path.glob("*c.*")} == {"c.bin", "c.idx", "c.manifest.json"}


def test_nothing_of_an_earlier_corpus_is_left(tmp_path, texts, tokenizer_folder):
    """A held-out share of before must not stand beside a corpus that holds its documents."""
    (tmp_path / "bad.jsonl").write_bytes(texts.read_bytes() + b"oops\n")
    build([tmp_path / "bad.jsonl"], tmp_path / "c", tokenizer_folder, held_out=0.1, max_rejects=1)
    build([texts], tmp_path / "c", tokenizer_folder, overwrite=True)
    assert {path.name for path in tmp_path.glob("*c.*")} == {"c.bin", "c.idx", "c.manifest.json"}
    build([texts], tmp_path / "d.heldout", tokenizer_folder)
    with pytest.raises(DetourError, match=r"d\.heldout\.manifest\.json: already exists"):
        build([texts], tmp_path / "d", tokenizer_folder, held_out=0.1)
    build([texts], tmp_path / "e", tokenizer_folder, held_out=0.1)
    (tmp_path / "e.heldout.bin").unlink()
    with pytest.raises(DetourError, match=r"e\.heldout\.bin: missing"):
        build([texts], tmp_path / "e", tokenizer_folder, held_out=0.1)


def test_a_missing_package_is_named(tmp_path, texts, tokenizer_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(DetourError, match=r"requires rensa: pip install"):
        build([texts], tmp_path / "c", tokenizer_folder, deduplicate="near")


def test_too_many_rejects_stop_a_part_at_once(tmp_path, tokenizer_folder):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"body": "text"}\n' * 300_000))
    reports = []
    part = sources.plan_parts(sources.plan_shards([str(tmp_path / "a.jsonl.gz")]), "")[0]
    options = BuildOptions(str(tmp_path / "c"), str(tokenizer_folder), (), max_rejects=10)
    job = worker.Job(options, "tokenizers", str(tokenizer_folder / "tokenizer.json"), "<u2", 2)
    with pytest.raises(DetourError, match=r"line 11: no key 'text'.*more than --max-rejects 10 records are invalid"):
        worker.build_part(part, job, lambda read, made: reports.append(read))
    assert len(reports) < 3
    assert not list((tmp_path / ".c.building").glob("*")) if (tmp_path / ".c.building").exists() else True


def test_a_file_that_grows_is_refused(tmp_path, texts, tokenizer_folder, monkeypatch):
    path = tmp_path / "t.jsonl"
    path.write_bytes(texts.read_bytes())
    real = corpus_build.run_parts

    def append_meanwhile(parts, job, journal):
        real(parts, job, journal)
        with path.open("a") as file:
            file.write(json.dumps({"text": "more"}) + "\n")

    monkeypatch.setattr(corpus_build, "run_parts", append_meanwhile)
    with pytest.raises(DetourError, match=r"t\.jsonl: changed during the build"):
        build([path], tmp_path / "c", tokenizer_folder)
    assert not list(tmp_path.glob("c.*"))
    monkeypatch.setattr(corpus_build, "run_parts", real)
    assert build([path], tmp_path / "c", tokenizer_folder).documents == 991


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"workers": 0}, "--workers: must be at least 1, not 0"),
        ({"max_rejects": -1}, "--max-rejects: must be at least 0, not -1"),
        ({"num_shards": 3}, "each process needs its --shard-index"),
        ({"num_shards": 3, "shard_index": 3}, "3 is not below --num-shards 3"),
        ({"num_shards": 3, "shard_index": 1, "engine_cluster": "ray"}, "--engine-cluster"),
        ({"max_chars": 5, "min_chars": 6}, "--max-chars: 5 is below --min-chars"),
        ({"held_out": 1.0}, "--held-out: must be at least 0 and below 1, not 1.0"),
        ({"similarity": 0.5}, "--similarity: requires --deduplicate near"),
        ({"dataset": "d"}, "--dataset: cannot be combined with --input"),
        ({"streaming": True}, "--streaming: requires --dataset"),
        ({"output_prefix": "folder/"}, "--output-prefix: folder/ is a folder"),
        ({"input": ()}, "--input: set --input or --dataset"),
    ],
)
def test_options_that_cannot_be(options, says):
    with pytest.raises(DetourError, match=says):
        BuildOptions(**({"output_prefix": "c", "tokenizer": "t", "input": ("a",)} | options)).check()
