"""Micro-batches: the same text under the same masks for every number of ranks and every micro-batch size."""

from __future__ import annotations

import itertools
import pickle
import random
import zlib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_detour.config import Corpus
from megatron_detour.corpus.train_tokenizer import train_tokenizer
from megatron_detour.data.batches import DocumentMixture, MicroBatch, RankBatch, document_positions, rank_batch
from megatron_detour.data.indexed import IndexedCorpus, bin_path
from megatron_detour.data.order import rank_micro_batches
from megatron_detour.errors import DetourError
from megatron_detour.objectives import IGNORE, CausalLM, Corruption, MaskedLM, Masking
from megatron_detour.objectives.hybrid import Hybrid
from megatron_detour.objectives.masked_next_token import MaskedNextToken
from megatron_detour.tokenizer.vocabulary import Vocabulary, find_tokenizer, load_tokenizer
from megatron_detour.tokenizer.word_boundaries import Words
from tests.conftest import build, sentences, write_jsonl

LENGTH = 128
STEP = (5 * 8 * LENGTH, 6 * 8 * LENGTH)  # the sixth step of eight sequences


@pytest.fixture(scope="module")
def vocabulary(tokenizer_folder) -> Vocabulary:
    return Vocabulary.from_tokenizer(load_tokenizer(tokenizer_folder))


@pytest.fixture(scope="module")
def second(tokenizer_folder, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("second")
    texts = write_jsonl(folder / "texts.jsonl", [sentences(random.Random(i), 2) for i in range(40)])
    build([texts], folder / "corpus", tokenizer_folder)
    return str(folder / "corpus")


@pytest.fixture
def opened(corpus, second, vocabulary):
    """A fresh reader, as each rank has its own."""
    corpora = (Corpus(corpus.prefix, 0.75), Corpus(second, 0.25))
    return lambda seed=42: DocumentMixture(corpora, LENGTH, seed, vocabulary)


def share_of(
    mixture: DocumentMixture, objective: Corruption, rank=0, ranks=1, micro=2, seed=17, step=STEP, multiple=1
) -> RankBatch:
    mine, of = rank_micro_batches(step[1] - step[0], micro * LENGTH, rank, ranks)
    return rank_batch(mixture, mixture.documents(*step), mine, of, objective, seed, multiple)


def all_labels(batch: MicroBatch) -> torch.Tensor:
    """[T], IGNORE where there is none."""
    return torch.full_like(batch.input_ids, IGNORE).scatter(0, batch.labeled, batch.labels)


def texts(batches: list[MicroBatch]) -> list[tuple]:
    """Inputs, labels and positions of every document, in an order of their own."""
    found = []
    for batch in batches:
        parts = [t.split(list(batch.lengths)) for t in (batch.input_ids, all_labels(batch), batch.positions)]
        found += [tuple(tuple(part.tolist()) for part in document) for document in zip(*parts, strict=True)]
    return sorted(found)


def directed(batches: list[MicroBatch]) -> list[tuple]:
    """Inputs of every document and the direction of its attention, in an order of their own."""
    return sorted((document[0], batch.causal) for batch in batches for document in texts([batch]))


KINDS = [
    CausalLM(),
    MaskedLM(0.3),
    MaskedLM(0.3, whole_word_masking=True, longest_span=10),
    MaskedNextToken(0.3),
    Hybrid(0.3, longest_span=10),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.describe())
@pytest.mark.parametrize(("ranks", "micro"), [(1, 1), (1, 8), (2, 1), (2, 4), (4, 2), (2, 3), (3, 2), (5, 1), (8, 8)])
def test_a_step_is_the_same_however_it_is_split(opened, vocabulary, tokenizer_folder, kind, ranks, micro):
    words = Words.from_file(find_tokenizer(tokenizer_folder), vocabulary)
    objective = kind.bind(vocabulary, words)
    reference = share_of(opened(), objective)
    shares = [share_of(opened(), objective, rank, ranks, micro) for rank in range(ranks)]
    assert texts([batch for share in shares for batch in share.micro_batches]) == texts(reference.micro_batches)
    for figure in ("crc", "labeled", "tokens"):
        assert sum(getattr(share, figure) for share in shares) == getattr(reference, figure) > 0
    directions = [causal for _, causal in directed([batch for share in shares for batch in share.micro_batches])]
    assert directions == [causal for _, causal in directed(reference.micro_batches)]
    assert set(directions) == {part.causal for _, part in kind.parts()}
    nominal = -(-8 // (ranks * micro))
    assert all(nominal <= len(share.micro_batches) <= nominal * len(kind.parts()) for share in shares)


def test_figures_of_a_share(opened, vocabulary):
    mixture = opened()
    batch = share_of(mixture, CausalLM().bind(vocabulary))
    documents = mixture.documents(*STEP)
    whole = np.split(mixture.tokens(documents), np.cumsum(documents.lengths)[:-1])
    assert batch.labeled == sum(int((all_labels(micro) != IGNORE).sum()) for micro in batch.micro_batches)
    assert batch.tokens == documents.lengths.sum() == sum(len(micro.input_ids) for micro in batch.micro_batches)
    assert batch.padding == 0
    assert batch.crc == sum(zlib.crc32(document.astype("<i4").tobytes()) for document in whole)


def test_micro_batches_are_of_like_size(opened, vocabulary):
    sizes = [len(one.input_ids) for one in share_of(opened(), CausalLM().bind(vocabulary), micro=1).micro_batches]
    assert len(sizes) == 8
    assert max(sizes) - min(sizes) <= LENGTH


def test_padding_to_a_multiple_is_a_document_without_labels(opened, vocabulary):
    plain, padded = (share_of(opened(), MaskedLM(0.3).bind(vocabulary), multiple=m) for m in (1, 64))
    assert 0 < padded.padding < 64 * len(padded.micro_batches)
    for without, batch in zip(plain.micro_batches, padded.micro_batches, strict=True):
        assert len(batch.input_ids) % 64 == 0
        assert batch.lengths[: len(without.lengths)] == without.lengths
        size = len(without.input_ids)
        assert torch.equal(batch.input_ids[:size], without.input_ids)
        assert (batch.input_ids[size:] == vocabulary.pad).all()
        assert torch.equal(batch.labeled, without.labeled)
        assert sum(batch.lengths) == len(batch.positions) == len(batch.input_ids)


def test_a_rank_without_a_document_has_a_padded_micro_batch(opened, vocabulary):
    one = (STEP[0], STEP[0] + 1)
    shares = [share_of(opened(), CausalLM().bind(vocabulary), rank, 8, step=one) for rank in range(8)]
    empty = [share.micro_batches[0] for share in shares if not share.tokens]
    assert empty
    assert all((batch.input_ids.tolist(), batch.lengths) == ([vocabulary.pad], (1,)) for batch in empty)
    assert all(len(batch.labels) == 0 for batch in empty)


def test_the_checksum_is_of_the_text_and_not_of_the_masks(opened, vocabulary):
    masked = MaskedLM(0.3).bind(vocabulary)
    one, two = (share_of(opened(), masked, seed=seed) for seed in (17, 18))
    causal = share_of(opened(), CausalLM().bind(vocabulary))
    assert one.crc == two.crc == causal.crc
    assert texts(one.micro_batches) != texts(two.micro_batches)
    assert share_of(opened(43), masked).crc != one.crc


def test_positions_restart_at_each_document(opened, vocabulary):
    batch = share_of(opened(), CausalLM().bind(vocabulary), micro=8).micro_batches[0]
    expected = [position for length in batch.lengths for position in range(length)]
    assert batch.positions.tolist() == expected
    assert len(batch.lengths) > 8


def test_positions_of():
    assert document_positions(np.array([3, 1, 2])).tolist() == [0, 1, 2, 0, 0, 1]


def test_every_document_comes_whole_and_corpora_keep_their_shares(opened, corpus, second):
    """Every piece is a document as it is on disk, cut at LENGTH only; each corpus has its share of the tokens."""
    pieces = []
    for stored in (IndexedCorpus(corpus.prefix), IndexedCorpus(second)):
        documents = [stored.tokens(i).tolist() for i in range(len(stored))]
        pieces.append({tuple(ids[i : i + LENGTH]) for ids in documents for i in range(0, len(ids), LENGTH)})
    assert not pieces[0] & pieces[1]
    mixture, total, seen = opened(), 400 * LENGTH, set()
    documents = mixture.documents(0, total)
    for one, text in zip(
        documents.corpora.tolist(),
        np.split(mixture.tokens(documents), np.cumsum(documents.lengths)[:-1]),
        strict=True,
    ):
        assert tuple(text.tolist()) in pieces[one]
        seen.add(tuple(text.tolist()))
    assert seen == pieces[0] | pieces[1]
    for number, share in enumerate((0.75, 0.25)):
        assert 0 <= documents.lengths[documents.corpora == number].sum() - share * total < LENGTH
    assert mixture.read_before(total) == dict(zip(mixture.prefixes, (300 * LENGTH, 100 * LENGTH), strict=True))


@pytest.mark.parametrize("weights", [(0.1, 0.2), (1e-6, 1.0), (3.0, 1.0), (0.7, 0.06)])
def test_weights_are_exact_in_tokens(corpus, second, vocabulary, weights):
    corpora = tuple(Corpus(prefix, weight) for prefix, weight in zip((corpus.prefix, second), weights, strict=True))
    mixture, total = DocumentMixture(corpora, LENGTH, 42, vocabulary), 200_000
    documents = mixture.documents(0, total)
    for number, weight in enumerate(weights):
        read = int(documents.lengths[documents.corpora == number].sum())
        assert abs(read - total * weight / sum(weights)) <= LENGTH


@given(cuts=st.lists(st.integers(1, 100_000), min_size=1, max_size=5))
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_stretches_of_a_mixture_make_up_the_whole(opened, cuts):
    """Also by a reader that comes from elsewhere: every document of the whole in one of them."""
    bounds = [0, *sorted(set(cuts))]
    mixture = opened()
    whole = mixture.documents(0, bounds[-1])
    parts = [mixture.documents(start, stop) for start, stop in reversed(list(itertools.pairwise(bounds)))]
    assert sorted(np.concatenate([part.numbers for part in parts]).tolist()) == sorted(whole.numbers.tolist())
    assert len(set(whole.numbers.tolist())) == len(whole)


def share_elsewhere(mixture: DocumentMixture, objective: Corruption, rank: int) -> RankBatch:
    return share_of(mixture, objective, rank, 8, 1)


def test_a_step_is_the_same_for_8_ranks_in_processes_of_their_own(opened, vocabulary):
    objective = MaskedLM(0.3).bind(vocabulary)
    expected = texts(share_of(opened(), objective).micro_batches)
    mixture = opened()
    mixture.tokens(mixture.documents(0, 2 * LENGTH))  # in use when it is copied
    copies = [pickle.loads(pickle.dumps(mixture)) for _ in range(8)]
    with ProcessPoolExecutor(2, get_context("fork")) as pool:
        shares = list(pool.map(share_elsewhere, copies, [objective] * 8, range(8)))
    assert texts([batch for share in shares for batch in share.micro_batches]) == expected


@pytest.mark.parametrize("value", [400, 0xFFFF])
def test_an_id_beyond_the_vocabulary_is_refused(corpus, vocabulary, tmp_path, value):
    """At tensor size 1 it was an IndexError of the embedding, at size 2 a row of zeros without a word."""
    for path in bin_path(corpus.prefix).parent.glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    prefix = tmp_path / bin_path(corpus.prefix).stem
    mixture = DocumentMixture((Corpus(str(prefix)),), LENGTH, 42, vocabulary)
    content = bytearray(bin_path(prefix).read_bytes())
    content[20:22] = value.to_bytes(2, "little")
    bin_path(prefix).write_bytes(content)
    with pytest.raises(DetourError, match=rf"\.bin: contains the id {value}, but the vocabulary has 400.* restore it"):
        mixture.tokens(mixture.documents(0, len(content) // 2))


def test_words_are_masked_whole(opened, vocabulary, corpus):
    words = Words.from_file(find_tokenizer(corpus.tokenizer), vocabulary)
    torn, step = [], (0, 200 * LENGTH)
    for objective in (Masking(vocabulary, 0.3, words), MaskedLM(0.3).bind(vocabulary)):
        batch = share_of(opened(), objective, micro=200, step=step).micro_batches[0]
        tokens = torch.where(all_labels(batch) == IGNORE, batch.input_ids, all_labels(batch)).numpy()
        first = words.first_tokens(tokens, np.array(batch.lengths))
        labeled = (all_labels(batch) != IGNORE).numpy()
        of_word = np.add.reduceat(labeled.astype(int), first) / np.diff(first, append=len(labeled))
        torn.append(((of_word > 0) & (of_word < 1)).mean())
        ordinary = ~np.isin(tokens, vocabulary.special_ids)
        assert labeled[ordinary].mean() == pytest.approx(0.3, abs=0.02)
    assert torn[0] == 0
    assert torn[1] > 0.05


def test_a_corpus_of_another_tokenizer_is_refused(corpus, tmp_path):
    train_tokenizer([corpus.jsonl], tmp_path / "other", 390)
    other = Vocabulary.from_tokenizer(load_tokenizer(tmp_path / "other"))
    with pytest.raises(DetourError) as caught:
        DocumentMixture((Corpus(corpus.prefix),), LENGTH, 42, other)
    message = str(caught.value)
    assert message.startswith(f"{corpus.prefix}: built with another tokenizer")
    assert "400 ids" in message
    assert "390 ids" in message
    assert message.endswith("set model.tokenizer to the corpus's")


def test_moving_a_micro_batch_keeps_what_it_holds(opened, vocabulary):
    batch = share_of(opened(), MaskedLM(0.3).bind(vocabulary)).micro_batches[0]
    moved = batch.to(torch.device("cpu"))
    assert all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(moved.arguments, batch.arguments, strict=True)
    )
