"""Sequences by number into flat microbatches: the place where numpy becomes torch.

A microbatch holds whole sequences one after the other, T = sequences * sequence_length positions. Sequence number k of
a run is the same pack with the same corruption for any number of ranks and any micro-batch.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch

from megatron_detour.config import Corpus
from megatron_detour.data.counts import CountsFile
from megatron_detour.data.indexed import IndexedCorpus
from megatron_detour.data.manifest import Manifest, read_manifest
from megatron_detour.data.order import Mixture
from megatron_detour.data.pack import PackedCorpus, Packs
from megatron_detour.data.vocabulary import Vocabulary
from megatron_detour.errors import DetourError
from megatron_detour.objectives import Objective


@dataclass(frozen=True)
class SequenceBatch:
    """Sequences that are packs: whole documents one after the other, and padding as the last document of each."""

    tokens: np.ndarray  # int32 [n, sequence_length]
    lengths: np.ndarray  # int64 [documents], those of the first sequence first
    padding: np.ndarray  # int64 [n]

    @property
    def crc(self) -> int:
        """Checksums of the uncorrupted tokens, summed; over a step they tell whether two runs saw the same text."""
        return sum(zlib.crc32(row) for row in self.tokens)


@dataclass(frozen=True)
class MicroBatch:
    """Flat int64 tensors, in the order of ModernBert.forward's arguments.

    Which positions have labels is known here, before anything is on a GPU that would have to be waited for.
    """

    input_ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T], within the document
    lengths: tuple[int, ...]  # of the documents
    causal: bool
    labelled: torch.Tensor  # [L], the positions in the microbatch that have labels
    labels: torch.Tensor  # [L]

    def to(self, device: torch.device) -> MicroBatch:
        if device.type == "cpu":
            return self
        # Out of pinned memory, as any other copy would be waited for.
        values = (v.pin_memory() if isinstance(v, torch.Tensor) else v for v in self.arguments)
        return MicroBatch(*(v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for v in values))

    @property
    def arguments(self) -> tuple:
        return tuple(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class RankBatch:
    """One rank's share of a step, with the figures that ranks add up."""

    micro_batches: list[MicroBatch]
    labelled: int
    padding: int
    crc: int


@dataclass(frozen=True)
class Beginning:
    """Where sequences begin: the number of the first, and how many of each corpus's packs were read before, by prefix.

    `seeds` are added to the order's seed, by prefix: a corpus keeps its order in whatever company it is read.
    """

    number: int = 0
    packs: dict[str, int] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)


class Sequences:
    """The endless sequences of a mixture of corpora, each a pure function of its number and the order's seed.

    It can be pickled, for the workers of a DataLoader: they open the files again.
    """

    def __init__(
        self,
        corpora: tuple[Corpus, ...],
        sequence_length: int,
        seed: int,
        vocabulary: Vocabulary,
        beginning: Beginning | None = None,
    ) -> None:
        beginning = beginning or Beginning()
        self.sequence_length = sequence_length
        self.vocabulary = vocabulary
        self.first = beginning.number
        self.prefixes = [corpus.prefix for corpus in corpora]
        self.manifests = _manifests(corpora)
        for corpus, manifest in zip(corpora, self.manifests, strict=True):
            _check_tokenizer(corpus.prefix, Vocabulary.from_dict(manifest.tokenizer), vocabulary)
        self.corpora = [IndexedCorpus(corpus.prefix) for corpus in corpora]
        self._packed = [
            PackedCorpus(
                c,
                sequence_length,
                seed + beginning.seeds.get(c.prefix, i),
                CountsFile(c.prefix, manifest.files["idx"]["sha256"]),
            )
            for i, (c, manifest) in enumerate(zip(self.corpora, self.manifests, strict=True))
        ]
        self._before = [beginning.packs.get(prefix, 0) for prefix in self.prefixes]
        self._mixture = Mixture([corpus.weight for corpus in corpora])

    def __getitem__(self, number: int) -> SequenceBatch:
        return self.read([number])

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of sequences by number, int64 [n]: each one's corpus and how many of that corpus come before it here."""
        return self._mixture.locate(numbers - self.first)

    def packs_read(self, end: int) -> dict[str, int]:
        """How many packs of each corpus, by prefix, are read before sequence number `end`, those before `first` too."""
        here = self._mixture.before(end - self.first)
        return {p: before + n for p, before, n in zip(self.prefixes, self._before, here.tolist(), strict=True)}

    def read(self, numbers: Sequence[int] | np.ndarray) -> SequenceBatch:
        """The sequences with these numbers."""
        which, ranks = self.locate(np.asarray(numbers))
        tokens = np.empty((len(which), self.sequence_length), dtype=np.int32)
        used = np.zeros(len(which), dtype=np.int64)
        lengths, rows = [], []
        for number, (corpus, packed) in enumerate(zip(self.corpora, self._packed, strict=True)):
            mine = np.flatnonzero(which == number)
            if len(mine):
                packs = packed.packs(ranks[mine] + self._before[number])
                tokens[mine] = _read_packs(corpus, packs, self.sequence_length, self.vocabulary.pad)
                rows.append(np.repeat(mine, np.diff(packs.bounds)))
                lengths.append(packs.lengths)
                used[mine] = np.add.reduceat(packs.lengths, packs.bounds[:-1])
        padding = self.sequence_length - used
        padded = np.flatnonzero(padding)
        in_order = np.argsort(np.concatenate([*rows, padded]), kind="stable")  # padding last in each
        return SequenceBatch(tokens, np.concatenate([*lengths, padding[padded]])[in_order], padding)


def _read_packs(corpus: IndexedCorpus, packs: Packs, sequence_length: int, pad: int) -> np.ndarray:
    """Tokens of the corpus's type [packs, sequence_length], padded."""
    rows = np.full((len(packs), sequence_length), pad, dtype=corpus.dtype)
    ends, counts = np.cumsum(packs.lengths), np.diff(packs.bounds)
    before = np.concatenate([[0], ends])[packs.bounds[:-1]]  # tokens in earlier packs
    to = ends - packs.lengths + np.repeat(np.arange(len(packs)) * sequence_length - before, counts)
    width = corpus.dtype.itemsize
    corpus.read(rows, zip((to * width).tolist(), packs.places.tolist(), (packs.lengths * width).tolist(), strict=True))
    return rows


def rank_batch(
    sequences: Sequences, numbers: Sequence[int] | np.ndarray, micro_sequences: int, objective: Objective, seed: int
) -> RankBatch:
    """The microbatches of the sequences with these numbers, corrupted under `seed`."""
    micro_batches, labelled, padding, crc = [], 0, 0, 0
    for first in range(0, len(numbers), micro_sequences):
        chosen = numbers[first : first + micro_sequences]
        micro_batch, batch = micro_batch_of(sequences, chosen, objective, seed)
        micro_batches.append(micro_batch)
        labelled += len(micro_batch.labels)
        padding += int(batch.padding.sum())
        crc += batch.crc
    return RankBatch(micro_batches, labelled, padding, crc)


def micro_batch_of(
    sequences: Sequences, numbers: Sequence[int] | np.ndarray, objective: Objective, seed: int
) -> tuple[MicroBatch, SequenceBatch]:
    batch = sequences.read(numbers)
    corrupted = objective.apply(batch.tokens, batch.lengths, seed, np.asarray(numbers))
    micro_batch = MicroBatch(
        torch.from_numpy(corrupted.inputs.reshape(-1)),
        torch.from_numpy(positions_of(batch.lengths)),
        tuple(batch.lengths.tolist()),
        objective.causal,
        torch.from_numpy(corrupted.labelled),
        torch.from_numpy(corrupted.labels),
    )
    return micro_batch, batch


def positions_of(lengths: np.ndarray) -> np.ndarray:
    """Positions within documents, int64 [sum of lengths], of documents with these lengths."""
    starts = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) - np.repeat(starts, lengths)


def rank_numbers(first: int, count: int, rank: int, ranks: int) -> range:
    """The sequence numbers of a data-parallel rank: its contiguous share of a step's `count` from `first` on."""
    share = count // ranks
    return range(first + rank * share, first + (rank + 1) * share)


def _manifests(corpora: tuple[Corpus, ...]) -> list[Manifest]:
    """Raises one DetourError that names every corpus that is not there or not whole."""
    manifests, faults = [], []
    for corpus in corpora:
        try:
            manifests.append(read_manifest(corpus.prefix))
        except DetourError as fault:
            faults.append(str(fault))
    if faults:
        raise DetourError(faults[0] if len(faults) == 1 else "\n  - ".join([f"{len(faults)} faults:", *faults]))
    return manifests


def _check_tokenizer(prefix: str, built_with: Vocabulary, used: Vocabulary) -> None:
    if built_with.sha256 != used.sha256:
        raise DetourError(
            f"{prefix}: this corpus was built with another tokenizer (sha256 {built_with.sha256[:12]}, "
            f"{built_with.size:,} ids) than the run's (sha256 {used.sha256[:12]}, {used.size:,} ids); build it again "
            "with the run's tokenizer, or set model.tokenizer to the corpus's"
        )
