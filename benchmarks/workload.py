"""The same documents, corrupted once, in each contender's format: packed, padded, flat."""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass

import numpy as np

from megatron_detour.data.indexed import IndexedCorpus
from megatron_detour.data.manifest import read_manifest
from megatron_detour.objectives import KINDS
from megatron_detour.tokenizer.vocabulary import Vocabulary

# Used without a corpus; size of the released English ModernBERTs, where the first ids are special.
INVENTED = Vocabulary(50_368, (0, 1, 2, 3, 4), mask=0, pad=1, cls=2, sep=3, unk=4, sha256="")
POOL = 16  # times the documents that are used
MEDIAN_LENGTH, SPREAD = 260, 0.8  # of the log-normal lengths of synthetic documents, like abstracts and paragraphs


@dataclass(frozen=True)
class Document:
    inputs: np.ndarray  # int64
    labels: np.ndarray  # int64, IGNORE where there is none


@dataclass(frozen=True)
class Workload:
    """Documents of at most `sequence_length` tokens, in order."""

    documents: list[Document]
    sequence_length: int
    objective: str
    vocabulary: Vocabulary

    @property
    def causal(self) -> bool:
        return KINDS[self.objective].causal

    @property
    def tokens(self) -> int:
        return sum(len(document.inputs) for document in self.documents)

    def packs(self) -> list[list[Document]]:
        """Pack documents into rows of at most `sequence_length` tokens."""
        packed = _packed([document.inputs for document in self.documents], self.sequence_length)
        return [[self.documents[number] for number in pack] for pack in packed]


def make_workload(
    corpus: str | None, objective: str, mask_rate: float, sequence_length: int, tokens: int, full: bool, seed: int
) -> Workload:
    """Return documents that fill packs of about `tokens` positions, from a corpus or synthetic. Raises DetourError.

    `corpus` is the prefix of a built corpus. Longer documents are truncated; with `full` every document is as long as
    the sequence.
    """
    generator = np.random.default_rng(seed)
    vocabulary = Vocabulary.from_dict(read_manifest(corpus).tokenizer) if corpus else INVENTED
    count = max(round(tokens / sequence_length), 1)
    texts = _texts(corpus, sequence_length, full, vocabulary, generator)
    # Pack many documents, as in training, and use some of the packs.
    pool = list(itertools.islice(texts, POOL * count * (1 if full else sequence_length // MEDIAN_LENGTH + 1)))
    packs = _packed(pool, sequence_length)
    chosen = [number for pack in generator.permutation(len(packs))[:count] for number in packs[pack]]
    corruption = KINDS[objective].for_validation(mask_rate).bind(vocabulary)
    documents = []
    for number in sorted(chosen):
        ids = pool[number]
        corrupted = corruption.apply(ids, np.array([len(ids)]), seed, np.array([number]))
        documents.append(Document(corrupted.inputs, corrupted.all_labels()))
    return Workload(documents, sequence_length, objective, vocabulary)


def _packed(texts: list[np.ndarray], sequence_length: int) -> list[list[int]]:
    """Return the indices of the texts in each pack, by best fit decreasing."""
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free positions, pack), ascending
    for number in sorted(range(len(texts)), key=lambda number: -len(texts[number])):
        fitting = bisect.bisect_left(rooms, (len(texts[number]), -1))
        room, pack = rooms.pop(fitting) if fitting < len(rooms) else (sequence_length, len(packs))
        if pack == len(packs):
            packs.append([])
        packs[pack].append(number)
        bisect.insort(rooms, (room - len(texts[number]), pack))
    return packs


def _texts(corpus: str | None, sequence_length: int, full: bool, vocabulary: Vocabulary, generator):
    """Yield token ids of documents endlessly, int64."""
    source = IndexedCorpus(corpus) if corpus else None
    while True:
        if source is not None and not full:
            document = int(generator.integers(len(source)))
            yield source.tokens(document, 0, min(int(source.lengths[document]), sequence_length)).astype(np.int64)
        else:
            length = sequence_length if full else int(generator.lognormal(np.log(MEDIAN_LENGTH), SPREAD))
            yield _invented(min(max(length, 8), sequence_length), vocabulary, generator)


def _invented(length: int, vocabulary: Vocabulary, generator: np.random.Generator) -> np.ndarray:
    ids = generator.choice(vocabulary.ordinary(), length)
    ids[0], ids[-1] = vocabulary.cls, vocabulary.sep
    return ids
