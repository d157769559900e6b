"""From a range of a run's tokens to packed micro-batches: where numpy becomes torch.

A step reads the documents that begin in its range of tokens, and distributes them over ranks and micro-batches. Which
documents these are, and how each is corrupted, does not depend on the number of ranks or the micro-batch size.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from fractions import Fraction

import numpy as np
import torch

from megatron_detour.config import Corpus
from megatron_detour.data.indexed import IndexedCorpus, bin_path
from megatron_detour.data.integrity import open_corpus
from megatron_detour.data.manifest import Manifest
from megatron_detour.data.order import balance
from megatron_detour.data.stream import DocumentStream
from megatron_detour.data.window_cache import WindowCache
from megatron_detour.errors import DetourError, format_faults
from megatron_detour.objectives import Corruption
from megatron_detour.tokenizer.vocabulary import Vocabulary

NUMBER_BITS = 48  # low bits of a document's random key: its offset in its corpus's stream; above them the corpus


@dataclass(frozen=True)
class Documents:
    """Documents, or pieces of long ones, grouped by corpus. All arrays are int64 [documents]."""

    corpora: np.ndarray  # ascending
    places: np.ndarray  # byte offset of the first token in the corpus's .bin
    lengths: np.ndarray  # in tokens
    numbers: np.ndarray  # random keys of their corruption

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, which: slice | np.ndarray) -> Documents:
        return Documents(*(getattr(self, field.name)[which] for field in fields(self)))


@dataclass(frozen=True)
class MicroBatch:
    """Flat int64 tensors, in the order of the model's arguments.

    The labeled positions are computed on the CPU, as finding them on a GPU would require a synchronization.
    """

    input_ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T], within the document
    lengths: tuple[int, ...]  # of the documents
    causal: bool
    labeled: torch.Tensor  # [L], the positions in the micro-batch that have labels
    labels: torch.Tensor  # [L]

    def pin(self) -> MicroBatch:
        """Return a copy in pinned memory, from which alone copies to a GPU are asynchronous."""
        return self._map(torch.Tensor.pin_memory)

    def to(self, device: torch.device) -> MicroBatch:
        return self._map(lambda value: value.to(device, non_blocking=True))

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        return MicroBatch(*(change(v) if isinstance(v, torch.Tensor) else v for v in self.arguments))

    @property
    def arguments(self) -> tuple:
        return tuple(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class RankBatch:
    """One rank's part of a step, with figures to be summed over ranks."""

    micro_batches: list[MicroBatch]
    tokens: int  # of documents
    labeled: int
    padding: int
    crc: int  # sum of checksums of the uncorrupted documents, to compare the text that runs have seen


@dataclass(frozen=True)
class StreamOffset:
    """Where a mixture begins: the first token of the run, and how many tokens of each corpus, by prefix, precede it.

    `seeds` are added to the order's seed, by prefix: a corpus keeps its order when others are added or removed.
    """

    start: int = 0
    read: dict[str, int] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)


class DocumentMixture:
    """The documents of several corpora, mixed by weight: a pure function of the run's token count and the order's seed.

    From the start to any token, each corpus contributes its share of the tokens to within a sequence. Pickling is
    supported: another process reopens the files.
    """

    def __init__(
        self,
        corpora: tuple[Corpus, ...],
        sequence_length: int,
        seed: int,
        vocabulary: Vocabulary,
        offset: StreamOffset | None = None,
    ) -> None:
        self._offset = offset or StreamOffset()
        self.sequence_length = sequence_length
        self.vocabulary = vocabulary
        self.prefixes = [corpus.prefix for corpus in corpora]
        opened = _open(self.prefixes, vocabulary)
        self.manifests = [manifest for manifest, _ in opened]
        self.corpora = [corpus for _, corpus in opened]
        weights = [Fraction(str(corpus.weight)) for corpus in corpora]
        self._shares = [weight / sum(weights) for weight in weights]
        self._seeds = [self._offset.seeds.get(prefix, i) for i, prefix in enumerate(self.prefixes)]
        self._streams = [
            DocumentStream(
                corpus,
                sequence_length,
                seed + own,
                WindowCache(corpus.prefix, manifest.files["idx"]["sha256"]),
            )
            for corpus, own, manifest in zip(self.corpora, self._seeds, self.manifests, strict=True)
        ]

    def read_before(self, token: int) -> dict[str, int]:
        """Return how many tokens of each corpus, by prefix, precede this token of the run."""
        return {
            prefix: self._offset.read.get(prefix, 0) + int((token - self._offset.start) * share)
            for prefix, share in zip(self.prefixes, self._shares, strict=True)
        }

    def documents(self, start: int, stop: int) -> Documents:
        """Return the documents that begin in the run's tokens [start, stop)."""
        parts = []
        limits = zip(self.read_before(start).values(), self.read_before(stop).values(), strict=True)
        for number, (stream, (first, last)) in enumerate(zip(self._streams, limits, strict=True)):
            pieces = stream.between(first, last)
            draws = (self._seeds[number] << NUMBER_BITS) + pieces.offsets
            parts.append((np.full(len(pieces), number), pieces.places, pieces.lengths, draws))
        return Documents(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def tokens(self, documents: Documents) -> np.ndarray:
        """Return the concatenated tokens of documents: int32 [sum of lengths]. Raises DetourError for invalid ids."""
        parts = []
        for number, corpus in enumerate(self.corpora):
            mine = documents[slice(*documents.corpora.searchsorted([number, number + 1]))]
            if len(mine):
                tokens = corpus.read(mine.places, mine.lengths)
                wrong = (tokens < 0) | (tokens >= self.vocabulary.size)
                if wrong.any():  # the embedding has no row for it
                    raise DetourError(
                        f"{bin_path(corpus.prefix)}: contains the id {int(tokens[wrong.argmax()])}, but the vocabulary "
                        f"has {self.vocabulary.size:,} ids: the file has changed since it was built; restore it or "
                        "rebuild the corpus"
                    )
                parts.append(tokens.astype(np.int32))
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)


def rank_batch(
    mixture: DocumentMixture,
    documents: Documents,
    micro_batches: range,
    of: int,
    objective: Corruption,
    seed: int,
    multiple: int = 1,
) -> RankBatch:
    """Return a rank's micro-batches, by number, of the `of` micro-batches that `documents` form over all ranks.

    One whose documents differ in the direction of attention becomes two. Each is padded to a multiple of `multiple`
    positions, as sequence parallelism requires.
    """
    assigned = balance(documents.lengths, of)
    batches, tokens, padding, crc = [], 0, 0, 0
    for number in micro_batches:
        mine = documents[assigned[number]]
        for corruption, which in objective.groups(seed, mine.numbers):
            chosen = mine[which]
            text = mixture.tokens(chosen)
            batches.append(micro_batch(text, chosen, corruption, seed, mixture.vocabulary.pad, multiple))
            tokens += len(text)
            padding += len(batches[-1].input_ids) - len(text)
            crc += sum(zlib.crc32(document) for document in split(text, chosen.lengths))
    return RankBatch(batches, tokens, sum(len(batch.labels) for batch in batches), padding, crc)


def micro_batch(
    tokens: np.ndarray, documents: Documents, objective: Corruption, seed: int, pad: int, multiple: int = 1
) -> MicroBatch:
    """Return documents corrupted under `seed`; padding, if any, forms a separate document."""
    corrupted = objective.apply(tokens, documents.lengths, seed, documents.numbers)
    inputs, lengths = corrupted.inputs, documents.lengths
    padding = -len(inputs) % multiple if len(inputs) else multiple  # a micro-batch is never empty
    if padding:
        inputs, lengths = np.pad(inputs, (0, padding), constant_values=pad), np.append(lengths, padding)
    return MicroBatch(
        torch.from_numpy(inputs),
        torch.from_numpy(document_positions(lengths)),
        tuple(lengths.tolist()),
        objective.causal,
        torch.from_numpy(corrupted.labeled),
        torch.from_numpy(corrupted.labels),
    )


def split(tokens: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Yield each document's tokens."""
    ends = np.cumsum(lengths).tolist()
    for length, end in zip(lengths.tolist(), ends, strict=True):
        yield tokens[end - length : end]


def document_positions(lengths: np.ndarray) -> np.ndarray:
    """Return positions within documents of these lengths: int64 [sum of lengths]."""
    starts = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) - np.repeat(starts, lengths)


def _open(prefixes: list[str], vocabulary: Vocabulary) -> list[tuple[Manifest, IndexedCorpus]]:
    """Raises one DetourError that names every corpus that cannot be used."""
    opened, faults = [], []
    for prefix in prefixes:
        try:
            opened.append(open_corpus(prefix, vocabulary))
        except DetourError as fault:
            faults.append(str(fault))
    if faults:
        raise DetourError(format_faults(faults))
    return opened
