"""Megatron's own builder and reader, from the package megatron-core, on our corpora."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from megatron_detour.corpus import sources
from megatron_detour.data.indexed import IndexedCorpus
from tests.conftest import BuiltCorpus, build


@pytest.fixture(scope="module")
def indexed_dataset():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it misses packages that its data part does not need
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_the_bytes_are_megatrons(corpus: BuiltCorpus, tmp_path, indexed_dataset, monkeypatch, dtype):
    """The same documents and tokenizer, built by us in many parts and by Megatron's builder."""
    monkeypatch.setattr(sources, "SHARD_BYTES", 5_000)
    if dtype == np.int32:  # as for a vocabulary of 65,500 ids and more
        monkeypatch.setattr("megatron_detour.corpus.build.token_type", lambda size: np.dtype(np.int32))
    build([corpus.jsonl], tmp_path / "ours", corpus.tokenizer, workers=2)
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer / "tokenizer.json"))
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for line in corpus.jsonl.read_text(encoding="utf-8").splitlines():
        builder.add_item(torch.tensor(tokenizer.encode(json.loads(line)["text"]).ids))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    for kind in ("bin", "idx"):
        assert Path(tmp_path / f"ours.{kind}").read_bytes() == Path(tmp_path / f"theirs.{kind}").read_bytes()


def test_megatron_reads_our_corpus(corpus: BuiltCorpus, indexed_dataset):
    theirs, ours = indexed_dataset.IndexedDataset(corpus.prefix), IndexedCorpus(corpus.prefix)
    assert len(theirs) == len(ours) == 300
    assert all(np.array_equal(theirs[i], ours.tokens(i)) for i in range(len(ours)))
    assert theirs.document_indices.tolist() == ours.documents.tolist()


def test_we_read_megatrons_corpus(tmp_path, indexed_dataset):
    documents = [[1, 2, 3], [4], [5, 6]]
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "c.bin"), dtype=np.int32)
    for ids in documents:
        builder.add_item(torch.tensor(ids))
        builder.end_document()
    builder.finalize(str(tmp_path / "c.idx"))
    corpus = IndexedCorpus(tmp_path / "c")
    assert [corpus.tokens(i).tolist() for i in range(3)] == documents
