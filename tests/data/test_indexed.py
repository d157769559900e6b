"""Megatron's index, byte for byte, and what is refused."""

from __future__ import annotations

import os
import pickle
import struct

import numpy as np
import pytest

from megatron_detour.data import indexed
from megatron_detour.data.indexed import IndexedCorpus, token_type, write_index
from megatron_detour.errors import DetourError

DOCUMENTS = [[5, 6, 7], [8], [9, 65_000, 11, 12]]
LENGTHS = np.array([3, 1, 4], dtype=np.int32)


def index_bytes(code: int, itemsize: int, magic: bytes = b"MMIDIDX\x00\x00", version: int = 1) -> bytes:
    """The table of the format's description, by hand, for DOCUMENTS."""
    return b"".join(
        (
            magic,
            struct.pack("<Q", version),
            struct.pack("<B", code),
            struct.pack("<Q", 3),
            struct.pack("<Q", 4),
            struct.pack("<3i", 3, 1, 4),
            struct.pack("<3q", 0, 3 * itemsize, 4 * itemsize),
            struct.pack("<4q", 0, 1, 2, 3),
        )
    )


def bin_bytes(form: str) -> bytes:
    return b"".join(struct.pack(f"<{len(ids)}{form}", *ids) for ids in DOCUMENTS)


@pytest.fixture
def prefix(tmp_path):
    (tmp_path / "c.idx").write_bytes(index_bytes(8, 2))
    (tmp_path / "c.bin").write_bytes(bin_bytes("H"))
    return tmp_path / "c"


@pytest.mark.parametrize(("dtype", "code"), [(np.uint16, 8), (np.int32, 4)])
def test_written_bytes(tmp_path, dtype, code):
    write_index(tmp_path / "c.idx", LENGTHS, np.dtype(dtype))
    written = (tmp_path / "c.idx").read_bytes()
    assert written == index_bytes(code, np.dtype(dtype).itemsize)
    assert len(written) == 42 + 20 * len(DOCUMENTS)


def test_offsets_do_not_overflow(tmp_path):
    lengths = np.full(3, 2**30, dtype=np.int32)
    write_index(tmp_path / "c.idx", lengths, np.dtype(np.int32))
    offsets = struct.unpack_from("<3q", (tmp_path / "c.idx").read_bytes(), 34 + 4 * 3)
    assert offsets == (0, 2**32, 2**33)


@pytest.mark.parametrize(("form", "code"), [("H", 8), ("i", 4), ("q", 5)])
def test_reading(tmp_path, form, code):
    (tmp_path / "c.idx").write_bytes(index_bytes(code, struct.calcsize(form)))
    (tmp_path / "c.bin").write_bytes(bin_bytes(form))
    corpus = IndexedCorpus(tmp_path / "c")
    assert len(corpus) == 3
    assert [corpus.tokens(i).tolist() for i in range(3)] == DOCUMENTS
    assert corpus.tokens(2, 1, 2).tolist() == [65_000, 11]
    assert corpus.tokens(2, 1).tolist() == [65_000, 11, 12]
    assert corpus.documents.tolist() == [0, 1, 2, 3]


def test_tokens_are_read_only_views(prefix):
    corpus = IndexedCorpus(prefix)
    whole = corpus.sample(10**6)
    assert np.shares_memory(corpus.tokens(1), whole)
    assert corpus.tokens(2, 1).ctypes.data == whole.ctypes.data + 2 * 5
    assert not corpus.tokens(0).flags.writeable


def test_sample_takes_ranges_from_all_over(tmp_path):
    ids = np.arange(50_000, dtype="<u2")
    write_index(tmp_path / "c.idx", np.array([len(ids)], dtype=np.int32), ids.dtype)
    (tmp_path / "c.bin").write_bytes(ids.tobytes())
    sample = IndexedCorpus(tmp_path / "c").sample(1_000, ranges=10)
    assert len(sample) == 1_000
    assert (sample[0], sample[-1]) == (0, 49_999)
    assert (np.diff(sample.astype(int)) == 1).sum() == 1_000 - 10


@pytest.mark.parametrize(
    ("size", "dtype"),
    [(400, np.uint16), (50_368, np.uint16), (65_499, np.uint16), (65_500, np.int32), (250_000, np.int32)],
)
def test_type_of_ids(size, dtype):
    assert token_type(size) == np.dtype(dtype)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "too short for an index"),
        (index_bytes(8, 2)[:33], "too short for an index"),
        (index_bytes(8, 2)[:-1], "101 bytes instead of 102"),
        (index_bytes(8, 2) + b"\0", "103 bytes instead of 102"),
        (index_bytes(8, 2, magic=b"MMIDIDX\x00\x01"), "not an index in Megatron's format"),
        (index_bytes(8, 2, version=2), "not an index in Megatron's format"),
        (index_bytes(99, 2), "not an index in Megatron's format"),
    ],
)
def test_a_damaged_index_is_refused(prefix, content, says):
    path = prefix.with_suffix(".idx")
    path.write_bytes(content)
    with pytest.raises(DetourError, match=says) as caught:
        IndexedCorpus(prefix)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("size", [0, 14, 15, 17, 18])
def test_a_bin_of_another_size_is_refused(prefix, size):
    (prefix.with_suffix(".bin")).write_bytes((bin_bytes("H") + bytes(2))[:size])
    with pytest.raises(DetourError, match=rf"c\.bin: {size} bytes instead of 16"):
        IndexedCorpus(prefix)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file_is_named(prefix, suffix):
    prefix.with_suffix(suffix).unlink()
    with pytest.raises(DetourError, match=rf"c\{suffix}: no such file; build the corpus") as caught:
        IndexedCorpus(prefix)
    assert f"--output-prefix {prefix}" in str(caught.value)


def corpus_of(folder, lengths: list[int], dtype=np.uint16) -> IndexedCorpus:
    """Documents of these lengths, the ids counted through."""
    write_index(folder / "c.idx", np.array(lengths, dtype=np.int32), np.dtype(dtype))
    (folder / "c.bin").write_bytes(np.arange(sum(lengths), dtype=dtype).tobytes())
    return IndexedCorpus(folder / "c")


@pytest.mark.parametrize("mapped", [1 << 26, 200])
def test_documents_are_found_in_any_order(tmp_path, monkeypatch, mapped):
    """Also where the index is left page by page."""
    monkeypatch.setattr(indexed, "MAPPED_BYTES", mapped)
    lengths = np.random.default_rng(0).integers(0, 9, 100).tolist()
    opened = corpus_of(tmp_path, lengths)
    asked = np.random.default_rng(1).integers(0, 100, 250)
    found, offsets = opened.locate(asked)
    assert found.dtype == offsets.dtype == np.int64
    assert found.tolist() == [lengths[i] for i in asked]
    assert offsets.tolist() == [2 * sum(lengths[:i]) for i in asked]
    assert opened.read_lengths(3, 30).tolist() == lengths[3:30]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_documents_are_read_one_after_the_other(tmp_path, dtype):
    opened, width = corpus_of(tmp_path, [5, 7, 3], dtype), np.dtype(dtype).itemsize
    tokens = opened.read(np.array([12, 2, 0]) * width, np.array([3, 2, 0]))
    assert (tokens.tolist(), tokens.dtype) == ([12, 13, 14, 2, 3], np.dtype(dtype))


def test_a_corpus_that_became_shorter_is_told(tmp_path):
    opened = corpus_of(tmp_path, [5, 7])
    os.truncate(tmp_path / "c.bin", 10)
    with pytest.raises(DetourError, match=r"c\.bin: truncated while in use"):
        opened.read(np.array([10]), np.array([7]))


@pytest.mark.parametrize("bit", [31, 30, 20, 6])
@pytest.mark.parametrize("document", [0, 1])
def test_a_length_that_does_not_fit_the_text_is_refused(tmp_path, document, bit):
    """A high bit made the start count windows for over 90 seconds."""
    corpus_of(tmp_path, [5, 7, 3])
    content = bytearray((tmp_path / "c.idx").read_bytes())
    content[34 + 4 * document + bit // 8] ^= 1 << bit % 8
    (tmp_path / "c.idx").write_bytes(content)
    opened = IndexedCorpus(tmp_path / "c")
    for look in (lambda: opened.locate(np.arange(3)), lambda: opened.read_lengths(0, 3)):
        with pytest.raises(DetourError, match=r"c\.idx: does not match c\.bin"):
            look()


def test_a_copy_of_an_open_corpus_opens_its_files_again(tmp_path):
    opened = corpus_of(tmp_path, [5, 7])
    copy = pickle.loads(pickle.dumps(opened))
    assert copy.tokens(1).tolist() == opened.tokens(1).tolist()
    assert copy.read(np.array([10]), np.array([7])).tolist() == list(range(5, 12))
