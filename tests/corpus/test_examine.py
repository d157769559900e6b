"""verify, stats, peek and merge: what a corpus holds, and that it is whole."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_detour.corpus.examine import peek, stats, summary, verify
from megatron_detour.corpus.merge import merge_corpora
from megatron_detour.corpus.options import BuildOptions
from megatron_detour.data.indexed import IndexedCorpus, write_index
from megatron_detour.data.manifest import read_manifest
from megatron_detour.errors import DetourError
from megatron_detour.files import file_facts
from megatron_detour.tokenizer.vocabulary import load_tokenizer
from tests.conftest import build, write_jsonl

ROOT = Path(__file__).parents[2]


def copy_of(corpus, folder: Path) -> Path:
    for suffix in (".bin", ".idx", ".manifest.json"):
        (folder / f"c{suffix}").write_bytes(Path(f"{corpus.prefix}{suffix}").read_bytes())
    return folder / "c"


def vouch(prefix: Path, **changes) -> None:
    """Makes the manifest agree with the files, as a faulty tool would."""
    files = {kind: file_facts(Path(f"{prefix}.{kind}")) for kind in ("bin", "idx")}
    manifest = dataclasses.replace(read_manifest_unchecked(prefix), files=files, **changes)
    manifest.write(Path(f"{prefix}.manifest.json"))


def read_manifest_unchecked(prefix: Path):
    from megatron_detour.data.manifest import Manifest

    return Manifest(**json.loads(Path(f"{prefix}.manifest.json").read_text(encoding="utf-8")))


def test_a_whole_corpus_is_verified(corpus):
    assert "intact, 300 documents" in verify(corpus.prefix)


def test_a_changed_byte_is_found(corpus, tmp_path):
    for suffix in (".bin", ".idx"):
        prefix = copy_of(corpus, tmp_path)
        content = bytearray(prefix.with_suffix(suffix).read_bytes())
        content[len(content) // 2] ^= 1
        prefix.with_suffix(suffix).write_bytes(content)
        with pytest.raises(DetourError, match=f"c{suffix}: its SHA-256 differs from the manifest's"):
            verify(str(prefix))


def test_files_that_agree_with_a_wrong_manifest(corpus, tmp_path):
    prefix = copy_of(corpus, tmp_path)
    whole = IndexedCorpus(prefix)
    lengths, ids = np.array(whole.lengths), np.array(whole.token_range(0, whole.token_count))
    ids[7] = 400
    prefix.with_suffix(".bin").write_bytes(ids.tobytes())
    vouch(prefix)
    with pytest.raises(DetourError, match="contains id 400, but the vocabulary has 400 ids"):
        verify(str(prefix))
    prefix = copy_of(corpus, tmp_path)
    vouch(prefix, documents=299)
    with pytest.raises(DetourError, match="its documents or tokens differ from the manifest's"):
        verify(str(prefix))
    lengths[3], lengths[4] = lengths[3] + lengths[4], 0
    write_index(prefix.with_suffix(".idx"), lengths, whole.dtype)
    vouch(prefix, documents=300)
    with pytest.raises(DetourError, match="are not contiguous"):
        verify(str(prefix))


def test_stats(corpus, tmp_path):
    prefix = copy_of(corpus, tmp_path)
    printed = dict(line.split("  ", 1) for line in stats(str(prefix)).splitlines() if not line.startswith(" "))
    printed = {name.strip(): value.strip() for name, value in printed.items()}
    manifest = read_manifest(prefix)
    assert printed["documents"] == "300"
    assert printed["tokens"] == f"{manifest.tokens:,}"
    assert printed["tokens per document"].startswith(f"{manifest.tokens / 300:,.1f} (longest ")
    assert (tmp_path / "c.lengths.png").read_bytes().startswith(b"\x89PNG")


def test_peek(corpus, tmp_path):
    texts = [json.loads(line)["text"] for line in corpus.jsonl.read_text(encoding="utf-8").splitlines()]
    shown = list(peek(corpus.prefix, str(corpus.tokenizer), 3, None))
    assert [entry.splitlines()[0].split(",")[0] for entry in shown] == [f"--- document {n}" for n in (0, 149, 299)]
    (entry,) = peek(corpus.prefix, str(corpus.tokenizer), 1, 5)
    assert texts[5] in entry
    (entry,) = peek(corpus.prefix, str(corpus.tokenizer), 1, 137)
    assert entry.endswith(" characters)") and len(entry) < 700
    for options, says in (
        ((None, 3, None), "--tokenizer: peek requires"),
        ((str(corpus.tokenizer), 3, 300), "has documents 0 to 299"),
    ):
        with pytest.raises(DetourError, match=says):
            list(peek(corpus.prefix, *options))


def test_merge_joins_in_order(corpus, tmp_path, tokenizer_folder):
    path = write_jsonl(tmp_path / "t.jsonl", ["one text", "another"])
    build([path], tmp_path / "b", tokenizer_folder)
    printed = merge_corpora([str(tmp_path / "b"), corpus.prefix], str(tmp_path / "m"))
    assert printed.startswith(f"{tmp_path / 'm'}: 302 documents, ")
    build([path, corpus.jsonl], tmp_path / "x", tokenizer_folder)
    first, second = IndexedCorpus(tmp_path / "m"), IndexedCorpus(tmp_path / "x")
    assert [first.tokens(i).tolist() for i in range(302)] == [second.tokens(i).tolist() for i in range(302)]
    verify(str(tmp_path / "m"))
    assert {p.name for p in tmp_path.glob(".*")} == set()
    assert read_manifest(tmp_path / "m").sources[1]["path"] == corpus.prefix


def test_merge_does_not_undo_a_held_out_share(tmp_path, tokenizer_folder):
    path = write_jsonl(tmp_path / "t.jsonl", [f"text {i}" for i in range(60)])
    build([path], tmp_path / "a", tokenizer_folder, held_out=0.3)
    with pytest.raises(DetourError, match=r"a\.heldout: was held out of"):
        merge_corpora([str(tmp_path / "a"), str(tmp_path / "a.heldout")], str(tmp_path / "m"))


def test_merge_refuses_what_does_not_fit(corpus, tmp_path, tokenizer_folder):
    other = load_tokenizer(tokenizer_folder)
    other.add_special_tokens(["[new]"])
    other.save(str(tmp_path / "tokenizer.json"))
    build([write_jsonl(tmp_path / "t.jsonl", ["one text"])], tmp_path / "b", tmp_path / "tokenizer.json")
    for prefixes, output, says in (
        ([corpus.prefix, str(tmp_path / "b")], "m", "built with another tokenizer"),
        ([corpus.prefix], "b", "already exists"),
        ([str(tmp_path / "b")], "b", "one of the corpora to merge"),
        ([str(tmp_path / "none")], "m", "no such corpus"),
        ([corpus.prefix, corpus.prefix], "m", "is given twice"),
        ([corpus.prefix], "", "is a folder"),
    ):
        with pytest.raises(DetourError, match=says):
            merge_corpora(prefixes, str(tmp_path / output))
    assert not (tmp_path / "m.bin").exists()


def test_merge_does_not_pass_on_damage(corpus, tmp_path):
    prefix = copy_of(corpus, tmp_path)
    content = bytearray(prefix.with_suffix(".bin").read_bytes())
    content[99] ^= 1
    prefix.with_suffix(".bin").write_bytes(content)
    with pytest.raises(DetourError, match=r"c\.bin: its SHA-256 differs from its manifest's"):
        merge_corpora([str(prefix), corpus.prefix], str(tmp_path / "m"))
    assert not list(tmp_path.glob("m.*"))


def test_tokenizers_that_do_not_fit_are_told(corpus):
    options, manifest = BuildOptions("c", "t", ("a",)), read_manifest(corpus.prefix)
    assert "warning" not in summary(options, manifest)
    printed = summary(options, dataclasses.replace(manifest, unknown=manifest.tokens // 10))
    assert "warning: 10.0% of the tokens are [UNK]" in printed
    printed = summary(options, dataclasses.replace(manifest, tokenizer=manifest.tokenizer | {"mask": None}))
    assert "warning: the tokenizer has no [MASK], which training requires" in printed


def test_whoever_reads_may_have_enough(corpus):
    command = (
        f"{sys.executable} {ROOT}/tools/preprocess_data.py peek {corpus.prefix} --tokenizer {corpus.tokenizer} -n 300"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", f"{command} | head -1"], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.startswith("--- document 0")
    assert done.stderr == ""


def test_the_commands_of_the_tool(corpus, tmp_path):
    def run(*words: str) -> str:
        command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), *words]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout

    prefix = str(copy_of(corpus, tmp_path))
    assert "intact, 300 documents" in run("verify", prefix)
    assert "tokens per document" in run("stats", prefix)
    assert run("peek", prefix, "--tokenizer", str(corpus.tokenizer), "-n", "2").count("--- document") == 2
    assert "600 documents" in run("merge", prefix, corpus.prefix, "--output-prefix", str(tmp_path / "m"))


def test_the_summary_of_a_shard_says_what_to_do_next():
    printed = summary(BuildOptions("c", "t", ("a",), num_shards=4, shard_index=1), None)
    assert printed.startswith("c: finished shard 1 of 4")
