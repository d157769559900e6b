"""Microbatches: the same text under the same masks for every number of ranks and every micro-batch size."""

from __future__ import annotations

import itertools
import pickle
import random
import zlib

import numpy as np
import pytest
import torch
import torch.utils.data
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_detour.config import Corpus
from megatron_detour.data.batches import (
    MicroBatch,
    RankBatch,
    Sequences,
    positions_of,
    rank_batch,
    rank_numbers,
)
from megatron_detour.data.indexed import IndexedCorpus
from megatron_detour.data.train_tokenizer import train_tokenizer
from megatron_detour.data.vocabulary import Vocabulary, find_tokenizer, load_tokenizer
from megatron_detour.data.words import Words
from megatron_detour.errors import DetourError
from megatron_detour.objectives import IGNORE, Objective, make
from tests.conftest import build, sentences, write_jsonl

LENGTH, STEP = 128, 8


@pytest.fixture(scope="module")
def vocabulary(tokenizer_folder) -> Vocabulary:
    return Vocabulary.of(load_tokenizer(tokenizer_folder))


@pytest.fixture(scope="module")
def second(tokenizer_folder, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("second")
    texts = write_jsonl(folder / "texts.jsonl", [sentences(random.Random(i), 2) for i in range(40)])
    build([texts], folder / "corpus", tokenizer_folder)
    return str(folder / "corpus")


@pytest.fixture
def open_sequences(corpus, second, vocabulary):
    """A fresh reader, as each rank has its own."""
    corpora = (Corpus(corpus.prefix, 0.75), Corpus(second, 0.25))
    return lambda seed=42: Sequences(corpora, LENGTH, seed, vocabulary)


def all_labels(batch: MicroBatch) -> torch.Tensor:
    """[T], IGNORE where there is none."""
    return torch.full_like(batch.input_ids, IGNORE).scatter(0, batch.labelled, batch.labels)


def joined(batches: list[MicroBatch]) -> dict[str, torch.Tensor]:
    whole = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in ("input_ids", "positions")}
    whole["labels"] = torch.cat([all_labels(batch) for batch in batches])
    return whole | {"lengths": torch.tensor([length for batch in batches for length in batch.lengths])}


@pytest.mark.parametrize(("name", "mask_rate"), [("mlm", 0.3), ("clm", None)])
@pytest.mark.parametrize(("ranks", "micro"), [(1, 1), (1, 8), (2, 1), (2, 4), (4, 2), (2, 3)])
def test_a_step_is_the_same_however_it_is_split(open_sequences, vocabulary, name, mask_rate, ranks, micro):
    objective, first = make(name, mask_rate, vocabulary), 5 * STEP
    reference = rank_batch(open_sequences(), range(first, first + STEP), 2, objective, 17)
    shares = [
        rank_batch(open_sequences(), rank_numbers(first, STEP, rank, ranks), micro, objective, 17)
        for rank in range(ranks)
    ]
    whole = joined([batch for share in shares for batch in share.micro_batches])
    for key, expected in joined(reference.micro_batches).items():
        assert torch.equal(whole[key], expected), key
    assert sum(share.crc for share in shares) == reference.crc
    assert sum(share.labelled for share in shares) == reference.labelled > 0
    assert sum(share.padding for share in shares) == reference.padding
    assert {batch.causal for share in shares for batch in share.micro_batches} == {name == "clm"}
    assert all(len(share.micro_batches) == -(-STEP // ranks // micro) for share in shares)


def test_figures_of_a_share(open_sequences, vocabulary):
    sequences = open_sequences()
    batch = rank_batch(sequences, range(3, 3 + STEP), 2, make("clm", None, vocabulary), 17)
    whole = joined(batch.micro_batches)
    assert batch.labelled == int((whole["labels"] != IGNORE).sum())
    assert batch.padding == int((whole["input_ids"] == vocabulary.pad).sum()) > 0
    assert batch.crc == sum(zlib.crc32(sequences[i].tokens.astype("<i4").tobytes()) for i in range(3, 3 + STEP))
    assert all(len(micro.input_ids) == 2 * LENGTH for micro in batch.micro_batches)


def test_the_checksum_is_of_the_text_and_not_of_the_masks(open_sequences, vocabulary):
    numbers, masked = range(STEP), make("mlm", 0.3, vocabulary)
    one, two = (rank_batch(open_sequences(), numbers, 2, masked, seed) for seed in (17, 18))
    causal = rank_batch(open_sequences(), numbers, 2, make("clm", None, vocabulary), 17)
    assert one.crc == two.crc == causal.crc
    assert not torch.equal(joined(one.micro_batches)["input_ids"], joined(two.micro_batches)["input_ids"])
    other = rank_batch(open_sequences(43), numbers, 2, masked, 17)
    assert other.crc != one.crc


def test_positions_restart_at_each_document(open_sequences, vocabulary):
    batch = rank_batch(open_sequences(), range(4), 4, make("clm", None, vocabulary), 17).micro_batches[0]
    expected = [position for length in batch.lengths for position in range(length)]
    assert batch.positions.tolist() == expected
    assert len(batch.lengths) > 8
    assert sum(batch.lengths) == len(batch.input_ids)


def test_positions_of():
    assert positions_of(np.array([3, 1, 2])).tolist() == [0, 1, 2, 0, 0, 1]


def test_a_sequence_holds_whole_documents_of_one_corpus(open_sequences, corpus, second, vocabulary):
    """Every piece is a document as it is on disk, cut at LENGTH only; all come, and the corpora keep their shares."""
    pieces = []
    for stored in (IndexedCorpus(corpus.prefix), IndexedCorpus(second)):
        documents = [stored.tokens(i).tolist() for i in range(len(stored))]
        pieces.append({tuple(ids[i : i + LENGTH]) for ids in documents for i in range(0, len(ids), LENGTH)})
    assert not pieces[0] & pieces[1]
    sequences, drawn, seen = open_sequences(), [0, 0], set()
    for number in range(400):
        sequence = sequences[number]
        assert sequence.tokens.shape == (1, LENGTH)
        assert sequence.lengths.sum() == LENGTH
        parts = [tuple(part.tolist()) for part in np.split(sequence.tokens[0], np.cumsum(sequence.lengths)[:-1])]
        if sequence.padding[0]:
            assert parts.pop() == (vocabulary.pad,) * sequence.padding[0]
        which = 0 if parts[0] in pieces[0] else 1
        assert set(parts) <= pieces[which]
        drawn[which] += 1
        seen |= set(parts)
    assert drawn == [300, 100]
    assert seen == pieces[0] | pieces[1]


@given(first=st.integers(0, 3_000), step=st.integers(1, 40), count=st.integers(1, 30))
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_many_at_once_are_the_same_as_one_by_one(open_sequences, first, step, count):
    """Also from several epochs, and from a reader that comes from elsewhere."""
    numbers = range(first, first + step * count, step)
    sequences = open_sequences()
    together = sequences.read(numbers)
    assert together.tokens.shape == (count, LENGTH)
    alone = [sequences[number] for number in reversed(numbers)][::-1]
    assert np.array_equal(together.tokens, np.concatenate([one.tokens for one in alone]))
    assert np.array_equal(together.lengths, np.concatenate([one.lengths for one in alone]))
    assert np.array_equal(together.padding, np.concatenate([one.padding for one in alone]))
    assert together.crc == sum(one.crc for one in alone)


class Corrupting(torch.utils.data.Dataset):
    """Sequences by number, each with its masks, as a DataLoader's workers make them."""

    def __init__(self, sequences: Sequences, numbers: range, objective: Objective) -> None:
        self.sequences, self.numbers, self.objective = sequences, numbers, objective

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> tuple[int, bytes, bytes]:
        (row,) = by_rows(rank_batch(self.sequences, self.numbers[place : place + 1], 1, self.objective, 17))
        return self.numbers[place], *row


def by_rows(share: RankBatch) -> list[tuple[bytes, bytes]]:
    """Inputs and labels of each of a share's sequences."""
    return [
        (inputs.numpy().tobytes(), labels.numpy().tobytes())
        for batch in share.micro_batches
        for inputs, labels in zip(
            batch.input_ids.reshape(-1, LENGTH), all_labels(batch).reshape(-1, LENGTH), strict=True
        )
    ]


@pytest.mark.parametrize("step", [0, 7])
def test_a_step_is_the_same_for_8_ranks_with_4_workers_each(open_sequences, vocabulary, step):
    """A worker takes every fourth sequence of its rank, from a copy of the reader."""
    objective, count, ranks, workers = make("mlm", 0.3, vocabulary), 32, 8, 4
    numbers = range(step * count, (step + 1) * count)
    expected = dict(zip(numbers, by_rows(rank_batch(open_sequences(), numbers, count, objective, 17)), strict=True))
    assert len(set(expected.values())) == count
    shares = [rank_numbers(numbers.start, count, rank, ranks) for rank in range(ranks)]
    for micro in (1, 2, 4):
        made = {}
        for share in shares:
            made |= zip(share, by_rows(rank_batch(open_sequences(), share, micro, objective, 17)), strict=True)
        assert made == expected
    made = {}
    for share, worker in itertools.product(shares, range(workers)):
        copy = pickle.loads(pickle.dumps(open_sequences()))
        dataset = Corrupting(copy, share[worker::workers], objective)
        made |= {number: tuple(row) for number, *row in (dataset[place] for place in range(len(dataset)))}
    assert made == expected


def test_workers_of_a_data_loader(open_sequences, vocabulary):
    """Real processes, forked from a reader in use: they read the same open files at their own places."""
    objective, count = make("mlm", 0.3, vocabulary), 32
    numbers = rank_numbers(5 * count, count, 1, 2)
    expected = by_rows(rank_batch(open_sequences(), numbers, 4, objective, 17))
    sequences = open_sequences()
    sequences.read(range(2))
    loader = torch.utils.data.DataLoader(
        Corrupting(sequences, numbers, objective), 2, num_workers=4, multiprocessing_context="fork", collate_fn=list
    )
    loaded = [item for batch in loader for item in batch]
    assert [number for number, *_ in loaded] == list(numbers)
    assert [tuple(row) for _, *row in loaded] == expected


def test_words_are_masked_whole(open_sequences, vocabulary, corpus):
    words = Words.of(find_tokenizer(corpus.tokenizer), vocabulary)
    tokens = open_sequences().read(range(200)).tokens.reshape(-1)
    torn = []
    for objective in (make("mlm", 0.3, vocabulary, words), make("mlm", 0.3, vocabulary)):
        batch = rank_batch(open_sequences(), range(200), 200, objective, 17).micro_batches[0]
        first = words.first_tokens(tokens, np.array(batch.lengths))
        labelled = (all_labels(batch) != IGNORE).numpy()
        of_word = np.add.reduceat(labelled.astype(int), first) / np.diff(first, append=len(labelled))
        torn.append(((of_word > 0) & (of_word < 1)).mean())
        ordinary = ~np.isin(tokens, vocabulary.special_ids)
        assert labelled[ordinary].mean() == pytest.approx(0.3, abs=0.02)
    assert torn[0] == 0
    assert torn[1] > 0.05


def test_a_corpus_of_another_tokenizer_is_refused(corpus, tmp_path):
    train_tokenizer([corpus.jsonl], tmp_path / "other", 390)
    other = Vocabulary.of(load_tokenizer(tmp_path / "other"))
    with pytest.raises(DetourError) as caught:
        Sequences((Corpus(corpus.prefix),), LENGTH, 42, other)
    message = str(caught.value)
    assert message.startswith(f"{corpus.prefix}: this corpus was built with another tokenizer")
    assert "400 ids" in message
    assert "390 ids" in message
    assert message.endswith("set model.tokenizer to the corpus's")


def test_moving_a_microbatch_keeps_what_it_holds(open_sequences, vocabulary):
    batch = rank_batch(open_sequences(), range(2), 2, make("mlm", 0.3, vocabulary), 17).micro_batches[0]
    moved = batch.to(torch.device("cpu"))
    assert all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(moved.arguments, batch.arguments, strict=True)
    )
