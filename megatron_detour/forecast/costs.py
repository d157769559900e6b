"""FLOPs of each phase, and its time at a rate: a measured one, or a share of a GPU's peak."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_detour.config import Corpus
from megatron_detour.data.indexed import IndexedCorpus
from megatron_detour.errors import DetourError
from megatron_detour.model.flops import Frozen, training_flops
from megatron_detour.model.shape import Shape
from megatron_detour.plan import PlannedPhase

SPANS, DOCUMENTS = 40, 250  # sampled per corpus: spans of consecutive documents, evenly spaced
MOST_DOCUMENTS = 100_000  # sampled per step
SESSION_SECONDS = 24 * 3600  # where the run file has no time_limit


@dataclass(frozen=True)
class Speed:
    """The assumed speed of a GPU: tokens per second, or its peak FLOP/s times MFU."""

    tokens_per_second: float | None = None  # per GPU, measured
    mfu: float | None = None
    peak: float | None = None  # FLOP/s

    @property
    def known(self) -> bool:
        return self.tokens_per_second is not None or (self.mfu is not None and self.peak is not None)


@dataclass(frozen=True)
class PhaseCost:
    name: str
    tokens: int
    flops: int  # that the method needs: without what is computed again
    seconds: float | None  # None: the speed is not known
    sampled: bool  # whether the documents are the corpora's, or else as long as the sequences
    mean_document: float  # tokens, as the model sees them: cut at the sequence length
    lengths: tuple[int, ...]  # of documents, mixed as the corpora are: about one step's


def phase_cost(shape: Shape, phase: PlannedPhase, recompute: str, speed: Speed, gpus: int) -> PhaseCost:
    """The cost of a phase, over all GPUs."""
    samples = [lengths_of(corpus, phase.sequence_length) for corpus in phase.corpora]
    sampled = all(lengths is not None for lengths in samples)
    if not sampled:
        samples = [(phase.sequence_length,)] * len(phase.corpora)
    weights = [corpus.weight / sum(c.weight for c in phase.corpora) for corpus in phase.corpora]
    pairs = list(zip(weights, samples, strict=True))
    flops_per_token = sum(weight * _flops_of(shape, phase, lengths) / sum(lengths) for weight, lengths in pairs)
    documents = sum(weight * len(lengths) / sum(lengths) for weight, lengths in pairs)
    flops = round(flops_per_token * phase.tokens)
    again = 4 / 3 if recompute == "full" else 1.0  # the forward pass once more
    seconds = None
    if speed.tokens_per_second:
        seconds = phase.tokens / (speed.tokens_per_second * gpus)
    elif speed.known:
        seconds = flops * again / (speed.peak * speed.mfu * gpus)
    step = phase.sequences * phase.sequence_length
    step_lengths = tuple(length for weight, lengths in pairs for length in _filling(round(weight * step), lengths))
    return PhaseCost(phase.name, phase.tokens, flops, seconds, sampled, 1 / documents, step_lengths)


def _filling(tokens: int, lengths: tuple[int, ...]) -> Iterator[int]:
    """Lengths, from all over those given, of about `tokens` in all."""
    count = min(round(tokens * len(lengths) / sum(lengths)), MOST_DOCUMENTS)
    return (lengths[number * len(lengths) // count] for number in range(count))


def lengths_of(corpus: Corpus, sequence_length: int) -> tuple[int, ...] | None:
    """Lengths of documents from all over a corpus, cut as a stream cuts them, or None where there is no such corpus."""
    try:
        index = IndexedCorpus(corpus.prefix)
    except (DetourError, OSError):
        return None
    if not len(index):
        return None
    starts, size = [0], len(index)
    if size > SPANS * DOCUMENTS:
        starts, size = np.linspace(0, size - DOCUMENTS, SPANS).astype(np.int64).tolist(), DOCUMENTS
    lengths = np.concatenate([index.read_lengths(start, start + size) for start in starts])
    whole, rest = np.divmod(lengths.astype(np.int64), sequence_length)
    return (*[sequence_length] * int(whole.sum()), *rest[rest > 0].tolist())


def _flops_of(shape: Shape, phase: PlannedPhase, lengths: tuple[int, ...]) -> int:
    tokens = sum(lengths)
    labeled = round(tokens * phase.objective.labeled_share(tokens / len(lengths)))
    return training_flops(shape, lengths, phase.objective.causal, labeled, Frozen.of(phase.settings.freeze))


def sessions(seconds: float, time_limit: int | None) -> int:
    """How many sessions of the time limit, or of a day, a run takes."""
    return math.ceil(seconds / (time_limit or SESSION_SECONDS))
