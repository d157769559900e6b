"""Stretches of a run's text into flat micro-batches: the place where numpy becomes torch.

A step reads the documents that begin in its stretch of tokens, and shares them out over ranks and micro-batches. Which
documents these are, and how each is corrupted, is the same for any number of ranks and any micro-batch.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from fractions import Fraction

import numpy as np
import torch

from megatron_detour.config import Corpus
from megatron_detour.data.indexed import IndexedCorpus, bin_path
from megatron_detour.data.integrity import refuse_changed
from megatron_detour.data.manifest import Manifest, read_manifest
from megatron_detour.data.order import deal
from megatron_detour.data.stream import DocumentStream
from megatron_detour.data.window_cache import WindowCache
from megatron_detour.errors import DetourError, format_faults
from megatron_detour.objectives import Corruption
from megatron_detour.tokenizer.vocabulary import Vocabulary

NUMBER_BITS = 48  # of a document's number, for its place in its corpus's stream; the corpus is above


@dataclass(frozen=True)
class Documents:
    """Documents, or pieces of long ones, each corpus's together. All arrays are int64 [documents]."""

    corpora: np.ndarray  # ascending
    places: np.ndarray  # the first token in the corpus's .bin, in bytes
    lengths: np.ndarray  # in tokens
    numbers: np.ndarray  # by which they draw their corruption

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, which: slice | np.ndarray) -> Documents:
        return Documents(*(getattr(self, field.name)[which] for field in fields(self)))


@dataclass(frozen=True)
class MicroBatch:
    """Flat int64 tensors, in the order of ModernBert.forward's arguments.

    Which positions have labels is known here, before anything is on a GPU that would have to be waited for.
    """

    input_ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T], within the document
    lengths: tuple[int, ...]  # of the documents
    causal: bool
    labelled: torch.Tensor  # [L], the positions in the micro-batch that have labels
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
    tokens: int  # of documents
    labelled: int
    padding: int
    crc: int  # checksums of the uncorrupted documents, summed: over a step they tell whether two runs saw the same text


@dataclass(frozen=True)
class StreamOffset:
    """Where a mixture begins: at which token of the run, and how many of each corpus's were read before, by prefix.

    `seeds` are added to the order's seed, by prefix: a corpus keeps its order in whatever company it is read.
    """

    start: int = 0
    read: dict[str, int] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)


class DocumentMixture:
    """The documents of several corpora by weight: a pure function of the run's tokens and the order's seed.

    Over any stretch that begins at the start each corpus has its share of the tokens, to within a sequence. It can be
    pickled, for other processes: they open the files again.
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
        self.manifests = _manifests(corpora)
        for corpus, manifest in zip(corpora, self.manifests, strict=True):
            _check_tokenizer(corpus.prefix, Vocabulary.from_dict(manifest.tokenizer), vocabulary)
        self.corpora = [
            _opened(corpus.prefix, manifest) for corpus, manifest in zip(corpora, self.manifests, strict=True)
        ]
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
        """How many tokens of each corpus, by prefix, come before this token of the run."""
        return {
            prefix: self._offset.read.get(prefix, 0) + int((token - self._offset.start) * share)
            for prefix, share in zip(self.prefixes, self._shares, strict=True)
        }

    def documents(self, start: int, stop: int) -> Documents:
        """The documents that begin in the run's tokens from `start` to before `stop`."""
        parts = []
        limits = zip(self.read_before(start).values(), self.read_before(stop).values(), strict=True)
        for number, (stream, (first, last)) in enumerate(zip(self._streams, limits, strict=True)):
            pieces = stream.between(first, last)
            draws = (self._seeds[number] << NUMBER_BITS) + pieces.offsets
            parts.append((np.full(len(pieces), number), pieces.places, pieces.lengths, draws))
        return Documents(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def tokens(self, documents: Documents) -> np.ndarray:
        """Their tokens, one document after the other: int32 [sum of lengths]."""
        parts = []
        for number, corpus in enumerate(self.corpora):
            mine = documents[slice(*documents.corpora.searchsorted([number, number + 1]))]
            if len(mine):
                tokens = corpus.read(mine.places, mine.lengths)
                wrong = (tokens < 0) | (tokens >= self.vocabulary.size)
                if wrong.any():  # the embedding has no row for it
                    raise DetourError(
                        f"{bin_path(corpus.prefix)}: holds the id {int(tokens[wrong.argmax()])}, the vocabulary has "
                        f"{self.vocabulary.size:,} ids: the file has changed since it was built; bring the file back "
                        "or build the corpus again"
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
    """A rank's micro-batches, by number, of the `of` into which all ranks share out `documents`.

    Each is padded to a multiple of `multiple` positions, as sequence parallelism asks.
    """
    shares = deal(documents.lengths, of)
    made, tokens, padding, crc = [], 0, 0, 0
    for number in micro_batches:
        mine = documents[shares[number]]
        text = mixture.tokens(mine)
        made.append(micro_batch(text, mine, objective, seed, mixture.vocabulary.pad, multiple))
        tokens += len(text)
        padding += len(made[-1].input_ids) - len(text)
        crc += sum(zlib.crc32(document) for document in split(text, mine.lengths))
    return RankBatch(made, tokens, sum(len(one.labels) for one in made), padding, crc)


def micro_batch(
    tokens: np.ndarray, documents: Documents, objective: Corruption, seed: int, pad: int, multiple: int = 1
) -> MicroBatch:
    """Documents corrupted under `seed`; padding, if any, is a document of its own."""
    corrupted = objective.apply(tokens, documents.lengths, seed, documents.numbers)
    inputs, lengths = corrupted.inputs, documents.lengths
    padding = -len(inputs) % multiple if len(inputs) else multiple  # a model is not asked for nothing
    if padding:
        inputs, lengths = np.pad(inputs, (0, padding), constant_values=pad), np.append(lengths, padding)
    return MicroBatch(
        torch.from_numpy(inputs),
        torch.from_numpy(positions_of(lengths)),
        tuple(lengths.tolist()),
        objective.causal,
        torch.from_numpy(corrupted.labelled),
        torch.from_numpy(corrupted.labels),
    )


def split(tokens: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Each document's tokens."""
    ends = np.cumsum(lengths).tolist()
    for length, end in zip(lengths.tolist(), ends, strict=True):
        yield tokens[end - length : end]


def positions_of(lengths: np.ndarray) -> np.ndarray:
    """Positions within documents, int64 [sum of lengths], of documents with these lengths."""
    starts = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) - np.repeat(starts, lengths)


def _manifests(corpora: tuple[Corpus, ...]) -> list[Manifest]:
    """Raises one DetourError that names every corpus that is not there or not whole."""
    manifests, faults = [], []
    for corpus in corpora:
        try:
            manifests.append(read_manifest(corpus.prefix))
        except DetourError as fault:
            faults.append(str(fault))
    if faults:
        raise DetourError(format_faults(faults))
    return manifests


def _opened(prefix: str, manifest: Manifest) -> IndexedCorpus:
    corpus = IndexedCorpus(prefix)  # a file of another size is told as such
    refuse_changed(prefix, manifest)
    return corpus


def _check_tokenizer(prefix: str, built_with: Vocabulary, used: Vocabulary) -> None:
    if built_with.sha256 != used.sha256:
        raise DetourError(
            f"{prefix}: this corpus was built with another tokenizer (sha256 {built_with.sha256[:12]}, "
            f"{built_with.size:,} ids) than the run's (sha256 {used.sha256[:12]}, {used.size:,} ids); build it again "
            "with the run's tokenizer, or set model.tokenizer to the corpus's"
        )
