"""Sequences by number into flat microbatches: the place where numpy becomes torch.

A microbatch holds whole sequences one after the other, T = sequences * sequence_length positions. Sequence number k of
a run is the same pack with the same corruption for any number of ranks and any micro-batch.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, fields

import numpy as np
import torch

from megatron_detour.config import Corpus
from megatron_detour.data.indexed import IndexedCorpus
from megatron_detour.data.manifest import Manifest, read_manifest
from megatron_detour.data.order import Mixture
from megatron_detour.data.pack import PackedCorpus
from megatron_detour.data.vocabulary import Vocabulary
from megatron_detour.errors import DetourError
from megatron_detour.objectives import IGNORE, Objective


@dataclass(frozen=True)
class Sequence:
    """A pack: tokens int64 [sequence_length]; lengths int64 [documents], padding being the last document."""

    tokens: np.ndarray
    lengths: np.ndarray
    padding: int

    @property
    def crc(self) -> int:
        """Checksum of the uncorrupted tokens; summed over a step it tells whether two runs saw the same text."""
        return zlib.crc32(self.tokens.tobytes())


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


class Sequences:
    """The endless sequences of a mixture of corpora: `self[k]` is a pure function of k and the order's seed."""

    def __init__(self, corpora: tuple[Corpus, ...], sequence_length: int, seed: int, vocabulary: Vocabulary) -> None:
        self.sequence_length = sequence_length
        self.vocabulary = vocabulary
        self.manifests = _manifests(corpora)
        for corpus, manifest in zip(corpora, self.manifests, strict=True):
            _check_tokenizer(corpus.prefix, Vocabulary.from_dict(manifest.tokenizer), vocabulary)
        self.corpora = [IndexedCorpus(corpus.prefix) for corpus in corpora]
        self._packed = [PackedCorpus(c, sequence_length, seed + i) for i, c in enumerate(self.corpora)]
        self._mixture = Mixture([corpus.weight for corpus in corpora])

    def __getitem__(self, number: int) -> Sequence:
        which, pack = self._mixture.locate(number)
        pieces = self._packed[which].pack(pack)
        tokens = np.full(self.sequence_length, self.vocabulary.pad, dtype=np.int64)
        lengths = [piece.length for piece in pieces]
        used = 0
        for piece in pieces:
            source = self.corpora[which].tokens(piece.document, piece.start, piece.length)
            tokens[used : used + piece.length] = source
            used += piece.length
        padding = self.sequence_length - used
        if padding:
            lengths.append(padding)
        return Sequence(tokens, np.array(lengths), padding)


def rank_batch(
    sequences: Sequences, numbers: range, micro_sequences: int, objective: Objective, seed: int
) -> RankBatch:
    """The microbatches of the sequences with these numbers, corrupted under `seed`."""
    micro_batches, labelled, padding, crc = [], 0, 0, 0
    for first in range(0, len(numbers), micro_sequences):
        chosen = numbers[first : first + micro_sequences]
        micro_batch, packs = micro_batch_of(sequences, chosen, objective, seed)
        micro_batches.append(micro_batch)
        labelled += len(micro_batch.labels)
        padding += sum(pack.padding for pack in packs)
        crc += sum(pack.crc for pack in packs)
    return RankBatch(micro_batches, labelled, padding, crc)


def micro_batch_of(
    sequences: Sequences, numbers: range, objective: Objective, seed: int
) -> tuple[MicroBatch, list[Sequence]]:
    packs = [sequences[number] for number in numbers]
    pairs = [
        objective.apply(pack.tokens, pack.lengths, seed, number) for number, pack in zip(numbers, packs, strict=True)
    ]
    inputs, labels = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
    lengths = np.concatenate([pack.lengths for pack in packs])
    labelled = np.flatnonzero(labels != IGNORE)
    micro_batch = MicroBatch(
        torch.from_numpy(inputs),
        torch.from_numpy(positions_of(lengths)),
        tuple(lengths.tolist()),
        objective.causal,
        torch.from_numpy(labelled),
        torch.from_numpy(labels[labelled]),
    )
    return micro_batch, packs


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
