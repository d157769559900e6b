"""The stream of a corpus: every token once per epoch, nothing cut that fits, any stretch at any time."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_detour.data import stream
from megatron_detour.data.stream import DocumentStream, Pieces
from megatron_detour.errors import DetourError


class Lengths:
    """All that a stream asks of a corpus."""

    dtype = np.dtype(np.uint16)
    prefix = "made up"

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = np.array(lengths, dtype=np.int32)
        self.token_count = int(self.lengths.sum())

    def __len__(self) -> int:
        return len(self.lengths)

    def read_lengths(self, first: int, last: int) -> np.ndarray:
        return self.lengths[first:last]

    def locate(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        places = 2 * (np.cumsum(self.lengths, dtype=np.int64) - self.lengths)
        return self.lengths[documents].astype(np.int64), places[documents]


CORPORA = st.lists(st.integers(0, 100), min_size=1, max_size=120).filter(any).map(Lengths)
SEQUENCES = st.integers(1, 70)
SEEDS = st.integers(0, 2**31 - 1)
WINDOWS = st.sampled_from([1, 7, 64, 8_192])
RANDOM = Lengths(np.random.default_rng(0).integers(1, 90, 400).tolist())


@pytest.fixture
def window_of(monkeypatch):
    return lambda documents: monkeypatch.setattr(stream, "WINDOW_DOCUMENTS", documents)


def as_list(pieces: Pieces) -> list[tuple[int, int, int]]:
    """(document, start, length) of every piece, in order."""
    return list(zip(pieces.documents.tolist(), pieces.starts.tolist(), pieces.lengths.tolist(), strict=True))


def epoch_of(of: DocumentStream, epoch: int = 0) -> list[tuple[int, int, int]]:
    tokens = of.corpus.token_count
    return as_list(of.between(epoch * tokens, (epoch + 1) * tokens))


@given(corpus=CORPORA, length=SEQUENCES, seed=SEEDS, window=WINDOWS)
@settings(deadline=None, max_examples=100)
def test_every_token_once_an_epoch_and_no_document_cut_that_fits(corpus, length, seed, window):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "WINDOW_DOCUMENTS", window)
        of = DocumentStream(corpus, length, seed)
        epochs = epoch_of(of, 0), epoch_of(of, 1)
    for pieces in epochs:
        seen = [np.zeros(n, dtype=int) for n in corpus.lengths]
        for document, start, tokens in pieces:
            assert start % length == 0
            assert tokens == min(length, corpus.lengths[document] - start) > 0
            seen[document][start : start + tokens] += 1
        assert all((times == 1).all() for times in seen)


@given(corpus=CORPORA, length=SEQUENCES, seed=SEEDS, window=WINDOWS, cuts=st.lists(st.integers(0, 9_000), max_size=9))
@settings(deadline=None, max_examples=100)
def test_stretches_in_any_order_make_up_the_stream(corpus, length, seed, window, cuts):
    """Across epochs, by one reader that jumps about and by fresh ones: what begins in a stretch is in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "WINDOW_DOCUMENTS", window)
        of, end = DocumentStream(corpus, length, seed), 3 * corpus.token_count
        whole = of.between(0, end)
        assert whole.offsets.tolist() == (np.cumsum(whole.lengths) - whole.lengths).tolist()
        bounds = [0, *sorted({cut % end for cut in cuts if cut % end}), end]
        stretches = list(itertools.pairwise(bounds))
        for start, stop in reversed(stretches):
            inside = (whole.offsets >= start) & (whole.offsets < stop)
            for reader in (of, DocumentStream(corpus, length, seed)):
                assert as_list(reader.between(start, stop)) == as_list(whole[inside])


@given(corpus=CORPORA, seed=SEEDS, window=WINDOWS)
@settings(deadline=None, max_examples=50)
def test_windows_hold_what_was_counted(corpus, seed, window):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "WINDOW_DOCUMENTS", window)
        patch.setattr(stream, "CHUNK", 17)
        of = DocumentStream(corpus, 32, seed)
        for epoch in (0, 3):
            assert of.count(epoch).sum() == corpus.token_count
            epoch_of(of, epoch)  # which refuses a window that holds another number of tokens


def test_pieces_stand_where_their_documents_do():
    pieces = DocumentStream(RANDOM, 32, 42).between(0, RANDOM.token_count)
    _, places = RANDOM.locate(pieces.documents)
    assert pieces.places.tolist() == (places + 2 * pieces.starts).tolist()
    assert pieces.starts.max() == 64


def test_epochs_differ():
    of = DocumentStream(RANDOM, 128, 42)
    first, second, third = (epoch_of(of, epoch) for epoch in range(3))
    assert first != second != third != first
    assert sorted(first) == sorted(second)
    assert np.mean([a == b for a, b in zip(first, second, strict=True)]) < 0.05


@given(seed=SEEDS, other=SEEDS)
@settings(deadline=None, max_examples=50)
def test_seeds_differ(seed, other):
    same = epoch_of(DocumentStream(RANDOM, 128, seed)) == epoch_of(DocumentStream(RANDOM, 128, other))
    assert same == (seed == other)


def test_seeds_differ_in_their_high_bits():
    low, high = (epoch_of(DocumentStream(RANDOM, 128, seed)) for seed in (42, 42 + (1 << 24)))
    assert low != high


def test_pieces_of_a_long_document_do_not_follow_each_other():
    of = DocumentStream(Lengths([1_000] * 50), 10, 42)
    documents = of.between(0, of.corpus.token_count).documents
    assert (documents[1:] == documents[:-1]).mean() < 0.05  # by chance one in fifty


def test_windows_are_of_one_size(window_of, monkeypatch):
    window_of(90)
    of = DocumentStream(Lengths([5] * 100), 128, 42)
    assert (of.windows, of.window_size) == (2, 50)
    monkeypatch.setattr(stream, "WINDOW_TOKENS", 10_000)
    assert DocumentStream(Lengths([1_000] * 40), 10, 42).window_size == 10


def test_windows_do_not_depend_on_the_sequence_length(window_of):
    window_of(7)
    short, long = (DocumentStream(RANDOM, length, 42) for length in (16, 512))
    tokens = int(long.count(0)[:9].sum())
    assert {d for d, *_ in as_list(short.between(0, tokens))} == {d for d, *_ in as_list(long.between(0, tokens))}


def test_a_copy_in_another_process_knows_the_same():
    of = DocumentStream(RANDOM, 128, 42)
    expected = as_list(of.between(5_000, 40_000))
    assert as_list(pickle.loads(pickle.dumps(of)).between(5_000, 40_000)) == expected


def test_the_stream_is_the_same_on_every_machine():
    """Runs resume by it: a change has to increase FORMAT in training/checkpoints.py and data/window_cache.py."""
    assert as_list(DocumentStream(Lengths([3, 9, 4, 1, 5]), 5, 42).between(0, 22)) == [
        (0, 0, 3),
        (1, 0, 5),
        (4, 0, 5),
        (2, 0, 4),
        (1, 5, 4),
        (3, 0, 1),
    ]


def test_a_corpus_without_tokens_is_refused():
    with pytest.raises(DetourError, match="made up: the corpus has no tokens"):
        DocumentStream(Lengths([0, 0]), 8, 42)
