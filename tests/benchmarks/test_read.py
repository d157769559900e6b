"""The benchmark of reading at a tiny size: it runs, and what it makes up is a corpus. Nothing here is timed."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from benchmarks import read
from benchmarks.read import VOCABULARY, Settings, make_corpus, measure
from megatron_detour.data.indexed import IndexedCorpus
from megatron_detour.data.manifest import read_manifest
from megatron_detour.errors import DetourError
from tests.harness import ROOT, environment

pytestmark = pytest.mark.integration


def settings(folder, **changes) -> Settings:
    return Settings(**({"folder": folder, "documents": 300, "mean": 40, "sequence_length": (64,)} | changes), **TINY)


TINY = {"sequences": 4, "batches": 2}


def test_the_corpus_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "CHUNK", 128)
    said = []
    prefix = make_corpus(settings(tmp_path / "new"), said.append)
    corpus, manifest = IndexedCorpus(prefix), read_manifest(prefix)
    assert len(corpus) == manifest.documents == 300
    assert corpus.token_count == manifest.tokens == corpus.lengths.sum()
    assert 35 < corpus.lengths.mean() < 45
    assert corpus.lengths.min() >= read.SHORTEST
    assert np.array_equal(corpus.offsets, 2 * (np.cumsum(corpus.lengths, dtype=np.int64) - corpus.lengths))
    assert np.array_equal(corpus.documents, np.arange(301))
    assert VOCABULARY.special()[corpus.tokens(7)].sum() == 0  # or there were nothing to mask
    assert len(said) == 1
    assert make_corpus(settings(tmp_path / "new"), said.append) == prefix
    assert len(said) == 1  # it was there


def test_all_figures_come(tmp_path):
    command = [sys.executable, "tools/benchmark.py", "read", "--folder", str(tmp_path), "--documents", "300"]
    command += ["--mean", "40", "--sequence-length", "64", "128", "--sequences", "4", "--batches", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment())
    lines = done.stdout.splitlines()
    assert lines[0] == "| what | figure |"
    for length in ("64", "128"):
        of_length = [line for line in lines if line.startswith(f"| {length}: ")]
        assert len(of_length) == 8
    assert "300 documents" in done.stderr


@pytest.mark.parametrize("wrong", [{"documents": 0}, {"mean": -1}, {"sequence_length": (64, 0)}])
def test_what_makes_no_sense_is_refused(tmp_path, wrong):
    name = next(iter(wrong)).replace("_", "-")
    with pytest.raises(DetourError, match=f"^--{name}: must be above 0"):
        measure(settings(tmp_path, **wrong), print)
