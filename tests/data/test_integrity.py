"""A corpus that has changed since it was built does not train on without a word, though its sizes agree."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_detour.config import Corpus
from megatron_detour.data import integrity
from megatron_detour.data.batches import DocumentMixture
from megatron_detour.data.indexed import bin_path, idx_path
from megatron_detour.data.integrity import sample_sha256
from megatron_detour.errors import DetourError
from megatron_detour.tokenizer.vocabulary import Vocabulary, load_tokenizer


@pytest.fixture
def copy(corpus, tmp_path) -> str:
    for path in Path(corpus.prefix).parent.glob("corpus*"):
        if path.is_file():
            shutil.copy(path, tmp_path)
    return str(tmp_path / "corpus")


def opened(prefix: str, tokenizer: Path) -> DocumentMixture:
    return DocumentMixture((Corpus(prefix),), 128, 42, Vocabulary.from_tokenizer(load_tokenizer(tokenizer)))


def flip(path: Path, place: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def test_an_unchanged_one_opens(copy, corpus):
    opened(copy, corpus.tokenizer)


@pytest.mark.parametrize(("place", "bit"), [(34, 0), (34, 6), (38, 3), (-1, 7), (-100, 2)])
def test_a_bit_of_the_index(copy, corpus, place, bit):
    flip(idx_path(copy), place, bit)
    with pytest.raises(DetourError, match=r"corpus\.idx: does not match the manifest"):
        opened(copy, corpus.tokenizer)


@pytest.mark.parametrize("place", [0, 777, -1])
def test_a_bit_of_a_small_text(copy, corpus, place):
    """The id may be one of the vocabulary: nothing but the hash tells."""
    flip(bin_path(copy), place)
    with pytest.raises(DetourError, match=r"corpus\.bin: does not match the manifest"):
        opened(copy, corpus.tokenizer)


def test_another_text_of_the_same_size(copy, corpus):
    bin_path(copy).write_bytes(bin_path(copy).read_bytes()[::-1])
    with pytest.raises(DetourError, match=r"corpus\.bin: does not match the manifest"):
        opened(copy, corpus.tokenizer)


def test_a_sample_spans_a_large_file(tmp_path, monkeypatch):
    monkeypatch.setattr(integrity, "BLOCK_BYTES", 10)
    path = tmp_path / "large"
    path.write_bytes(bytes(range(256)) * 100)
    before = sample_sha256(path)
    assert before == sample_sha256(path)
    for place in (0, 9, -1, -10):
        flip(path, place)
        assert sample_sha256(path) != before
        flip(path, place)
    path.write_bytes(path.read_bytes()[:-1])
    assert sample_sha256(path) != before
