"""FLOPs of each phase, and its time at a measured rate or at an assumed MFU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_detour.config import Corpus
from megatron_detour.data.indexed import IndexedCorpus
from megatron_detour.errors import DetourError
from megatron_detour.model.families import Family
from megatron_detour.model.flops import Frozen, training_flops
from megatron_detour.plan import PlannedPhase

SPANS, DOCUMENTS = 40, 250  # sampled per corpus: spans of consecutive documents, evenly spaced
MOST_DOCUMENTS = 100_000  # sampled per step
SESSION_SECONDS = 24 * 3600  # without a time_limit in the run file


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
    flops: int  # required by the model: without recomputation
    seconds: float | None  # None if the speed is unknown
    sampled: bool  # whether lengths were sampled from the corpora; otherwise documents are as long as the sequences
    mean_document: float  # mean tokens of documents, cut at the sequence length
    lengths: tuple[int, ...]  # of documents of about one step, mixed by the corpora's weights


def phase_cost(shape: Family, phase: PlannedPhase, recompute: str, speed: Speed, gpus: int) -> PhaseCost:
    """Return the cost of a phase, over all GPUs."""
    samples = [sample_lengths(corpus, phase.sequence_length) for corpus in phase.corpora]
    sampled = all(lengths is not None for lengths in samples)
    if not sampled:
        samples = [(phase.sequence_length,)] * len(phase.corpora)
    weights = [corpus.weight / sum(c.weight for c in phase.corpora) for corpus in phase.corpora]
    pairs = list(zip(weights, samples, strict=True))
    flops_per_token = sum(weight * _flops(shape, phase, lengths) / sum(lengths) for weight, lengths in pairs)
    documents = sum(weight * len(lengths) / sum(lengths) for weight, lengths in pairs)
    flops = round(flops_per_token * phase.tokens)
    recomputation = 4 / 3 if recompute == "full" else 1.0  # a second forward pass
    seconds = None
    if speed.tokens_per_second:
        seconds = phase.tokens / (speed.tokens_per_second * gpus)
    elif speed.known:
        seconds = flops * recomputation / (speed.peak * speed.mfu * gpus)
    step = phase.sequences * phase.sequence_length
    step_lengths = tuple(length for weight, lengths in pairs for length in _sample(round(weight * step), lengths))
    return PhaseCost(phase.name, phase.tokens, flops, seconds, sampled, 1 / documents, step_lengths)


def _sample(tokens: int, lengths: tuple[int, ...]) -> Iterator[int]:
    """Return lengths that sum to about `tokens`, evenly spaced in `lengths`."""
    count = min(round(tokens * len(lengths) / sum(lengths)), MOST_DOCUMENTS)
    return (lengths[number * len(lengths) // count] for number in range(count))


def sample_lengths(corpus: Corpus, sequence_length: int) -> tuple[int, ...] | None:
    """Sample document lengths of a corpus, cut at the sequence length; None if the corpus is missing or empty."""
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


def _flops(shape: Family, phase: PlannedPhase, lengths: tuple[int, ...]) -> int:
    tokens = sum(lengths)
    labeled = round(tokens * phase.objective.labeled_share(tokens / len(lengths)))
    return training_flops(shape, lengths, phase.objective.causal, labeled, Frozen.from_parts(phase.settings.freeze))


def sessions(seconds: float, time_limit: int | None) -> int:
    """Return the number of sessions of a run, each as long as the time limit, or a day."""
    return math.ceil(seconds / (time_limit or SESSION_SECONDS))
