"""The same documents, corrupted once, as every contender wants them: packed, padded, flat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_detour.data.indexed import IndexedCorpus
from megatron_detour.data.manifest import read_manifest
from megatron_detour.data.pack import Piece, best_fit_decreasing
from megatron_detour.data.vocabulary import Vocabulary
from megatron_detour.objectives import make

# As of the released English ModernBERTs, where no corpus is given: the first ids are special.
INVENTED = Vocabulary(50_368, (0, 1, 2, 3, 4), mask=0, pad=1, cls=2, sep=3, unk=4, sha256="")
MEDIAN_LENGTH, SPREAD = 260, 0.8  # of the log-normal lengths of invented documents: those of abstracts and paragraphs


@dataclass(frozen=True)
class Document:
    inputs: np.ndarray  # int64
    labels: np.ndarray  # int64, IGNORE where there is none


@dataclass(frozen=True)
class Workload:
    """Documents of at most `sequence_length` tokens, in the order in which they come."""

    documents: list[Document]
    sequence_length: int
    objective: str
    vocabulary: Vocabulary

    @property
    def causal(self) -> bool:
        return self.objective == "clm"

    @property
    def tokens(self) -> int:
        return sum(len(document.inputs) for document in self.documents)

    def packs(self) -> list[list[Document]]:
        """Documents together in rows of at most `sequence_length` tokens."""
        pieces = [Piece(i, 0, len(document.inputs)) for i, document in enumerate(self.documents)]
        packed = best_fit_decreasing(pieces, self.sequence_length)
        return [[self.documents[piece.document] for piece in pack] for pack in packed]


def make_workload(
    corpus: str | None, objective: str, mask_rate: float, sequence_length: int, tokens: int, full: bool, seed: int
) -> Workload:
    """About `tokens` tokens, drawn from a corpus that tools/preprocess_data.py built, or invented.

    Longer documents lose their end; `full` makes every document as long as the sequence. Raises DetourError.
    """
    generator = np.random.default_rng(seed)
    vocabulary = Vocabulary.from_dict(read_manifest(corpus).tokenizer) if corpus else INVENTED
    corruption = make(objective, mask_rate, vocabulary)
    texts = _drawn(IndexedCorpus(corpus), sequence_length, generator) if corpus else None
    documents, total = [], 0
    while total < tokens:
        if full or texts is None:
            length = sequence_length if full else int(generator.lognormal(np.log(MEDIAN_LENGTH), SPREAD))
            ids = _invented(min(max(length, 8), sequence_length), vocabulary, generator)
        else:
            ids = next(texts)
        inputs, labels = corruption.apply(ids, np.array([len(ids)]), seed, len(documents))
        documents.append(Document(inputs, labels))
        total += len(ids)
    return Workload(documents, sequence_length, objective, vocabulary)


def _drawn(corpus: IndexedCorpus, sequence_length: int, generator: np.random.Generator):
    while True:
        document = int(generator.integers(len(corpus)))
        yield corpus.tokens(document, 0, min(int(corpus.lengths[document]), sequence_length)).astype(np.int64)


def _invented(length: int, vocabulary: Vocabulary, generator: np.random.Generator) -> np.ndarray:
    ids = generator.choice(vocabulary.ordinary(), length)
    ids[0], ids[-1] = vocabulary.cls, vocabulary.sep
    return ids
