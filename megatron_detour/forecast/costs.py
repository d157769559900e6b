"""FLOPs of each phase, and its time at a measured rate, at an assumed MFU, or at a share of the roofline."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from megatron_detour.config import Corpus
from megatron_detour.data.indexed import IndexedCorpus
from megatron_detour.data.order import rank_micro_batches
from megatron_detour.errors import DetourError
from megatron_detour.model import roofline
from megatron_detour.model.families import Family
from megatron_detour.model.flops import Frozen, training_flops
from megatron_detour.model.peaks import Chip
from megatron_detour.plan import PlannedPhase

SPANS, DOCUMENTS = 40, 250  # sampled per corpus: spans of consecutive documents, evenly spaced
MOST_DOCUMENTS = 100_000  # sampled per step
SESSION_SECONDS = 24 * 3600  # without a time_limit in the run file
# Of the roofline that a run is assumed to reach: the paper's French base run, at 203,000 tokens/s, is at 67% of it.
ASSUMED_SHARE = 0.67


@dataclass(frozen=True)
class Speed:
    """The assumed speed of a GPU: tokens per second, or an MFU, or else ASSUMED_SHARE of its roofline."""

    tokens_per_second: float | None = None  # per GPU, measured
    mfu: float | None = None
    chip: Chip | None = None  # None: unknown
    attention: str = "varlen"  # a key of roofline.ATTENTION

    @property
    def known(self) -> bool:
        return self.tokens_per_second is not None or self.chip is not None

    @property
    def is_modeled(self) -> bool:
        """Whether times follow from the roofline."""
        return self.chip is not None and self.tokens_per_second is None and self.mfu is None


@dataclass(frozen=True)
class Sample:
    """Documents of a phase. If a corpus is missing, they are as long as the sequences."""

    corpora: tuple[tuple[float, tuple[int, ...]], ...]  # share of the tokens and lengths of documents, by corpus
    sampled: bool  # from the corpora

    @classmethod
    def from_phase(cls, phase: PlannedPhase) -> Sample:
        samples = [sample_lengths(corpus, phase.sequence_length) for corpus in phase.corpora]
        sampled = all(lengths is not None for lengths in samples)
        if not sampled:
            samples = [(phase.sequence_length,)] * len(phase.corpora)
        total = sum(corpus.weight for corpus in phase.corpora)
        weights = (corpus.weight / total for corpus in phase.corpora)
        return cls(tuple(zip(weights, samples, strict=True)), sampled)

    @property
    def mean_document(self) -> float:
        """Mean tokens of documents, cut at the sequence length."""
        return 1 / self.per_token(len)

    def per_token(self, count: Callable[[tuple[int, ...]], float]) -> float:
        """Return what `count` returns for the documents of a corpus, per token, averaged by the corpora's shares."""
        return sum(share * count(lengths) / sum(lengths) for share, lengths in self.corpora)

    def step(self, tokens: int) -> tuple[int, ...]:
        """Return the lengths of documents of about `tokens` tokens, mixed by the corpora's shares."""
        return tuple(length for share, lengths in self.corpora for length in _spaced(round(share * tokens), lengths))


@dataclass(frozen=True)
class PhaseCost:
    name: str
    tokens: int
    flops: int  # required by the model: without recomputation
    seconds: float | None  # None if the speed is unknown
    roofline: float | None  # seconds at the roofline, None unless `seconds` follows from it
    sampled: bool  # whether lengths were sampled from the corpora; otherwise documents are as long as the sequences
    mean_document: float  # mean tokens of documents, cut at the sequence length


def phase_cost(
    shape: Family, phase: PlannedPhase, sample: Sample, recompute: str, speed: Speed, gpus: int, tensor: int = 1
) -> PhaseCost:
    """Return the cost of a phase, over all GPUs, of which each model takes `tensor`."""
    flops = round(sample.per_token(lambda lengths: _flops(shape, phase, lengths)) * phase.tokens)
    recomputation = 4 / 3 if recompute == "full" else 1.0  # a second forward pass
    seconds = bound = None
    if speed.tokens_per_second:
        seconds = phase.tokens / (speed.tokens_per_second * gpus)
    elif speed.is_modeled:
        bound = roofline_seconds(shape, phase, sample, recompute, speed, gpus, tensor)
        seconds = bound / ASSUMED_SHARE
    elif speed.known:
        seconds = flops * recomputation / (speed.chip.flops * speed.mfu * gpus)
    return PhaseCost(phase.name, phase.tokens, flops, seconds, bound, sample.sampled, sample.mean_document)


def roofline_seconds(
    shape: Family, phase: PlannedPhase, sample: Sample, recompute: str, speed: Speed, gpus: int, tensor: int
) -> float:
    """Return the time of a phase at the roofline of its GPUs, without communication."""
    frozen = Frozen.from_parts(phase.settings.freeze)

    def seconds(lengths: tuple[int, ...]) -> float:
        return sum(
            share * roofline.seconds(shape, lengths, causal, labeled, speed.chip, speed.attention, frozen, recompute)
            for share, causal, labeled in _parts(phase, lengths)
        )

    data, length = max(gpus // tensor, 1), phase.sequence_length
    mine, _ = rank_micro_batches(phase.sequences * length, phase.micro_sequences * length, 0, data)
    micro_batches = len(mine) * len(phase.objective.parts())
    update = roofline.update_seconds(shape.parameters / tensor, speed.chip, micro_batches, data)
    return sample.per_token(seconds) * phase.tokens / gpus + phase.steps * update


def _spaced(tokens: int, lengths: tuple[int, ...]) -> Iterator[int]:
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


def _flops(shape: Family, phase: PlannedPhase, lengths: tuple[int, ...]) -> float:
    frozen = Frozen.from_parts(phase.settings.freeze)
    return sum(
        share * training_flops(shape, lengths, causal, labeled, frozen)
        for share, causal, labeled in _parts(phase, lengths)
    )


def _parts(phase: PlannedPhase, lengths: tuple[int, ...]) -> Iterator[tuple[float, bool, int]]:
    """Yield the direction of attention and the labeled positions of these documents under each part of the objective,
    with its share of the documents."""
    tokens = sum(lengths)
    for share, part in phase.objective.parts():
        yield share, part.causal, round(tokens * part.labeled_share(tokens / len(lengths), phase.tokens))


def sessions(seconds: float, time_limit: int | None) -> int:
    """Return the number of sessions of a run, each as long as the time limit, or a day."""
    return math.ceil(seconds / (time_limit or SESSION_SECONDS))
