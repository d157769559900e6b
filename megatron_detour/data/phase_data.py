"""The documents that each phase of a run reads. Consecutive phases with the same data continue one stream; a phase with
other corpora, weights or sequence length continues each corpus after the tokens that the phases before it have read.

Another sequence length cuts long documents into other pieces, which are reshuffled within a window of the order
(data/stream.py): in the window where the change falls, some pieces repeat and others wait for the next epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_detour.config import Corpus
from megatron_detour.data.batches import DocumentMixture, StreamOffset
from megatron_detour.data.manifest import Manifest
from megatron_detour.plan import Plan, PlannedPhase
from megatron_detour.tokenizer.vocabulary import Vocabulary


@dataclass(frozen=True)
class DataSpan:
    """Consecutive phases with the same data, and their documents."""

    corpora: tuple[Corpus, ...]
    mixture: DocumentMixture


class PhaseData:
    """The documents of all phases of a plan."""

    def __init__(self, plan: Plan, order_seed: int, vocabulary: Vocabulary) -> None:
        prefixes = dict.fromkeys(corpus.prefix for phase in plan.phases for corpus in phase.corpora)
        seeds = {prefix: number for number, prefix in enumerate(prefixes)}
        read: dict[str, int] = {}  # tokens of each corpus before the span
        self.spans: list[DataSpan] = []
        self._span_by_phase: dict[str, DataSpan] = {}
        for phases in _spans_of_equal_data(plan.phases):
            first = phases[0]
            offset = StreamOffset(first.start, dict(read), seeds)
            mixture = DocumentMixture(first.corpora, first.sequence_length, order_seed, vocabulary, offset)
            span = DataSpan(first.corpora, mixture)
            self.spans.append(span)
            self._span_by_phase |= {phase.name: span for phase in phases}
            read |= mixture.read_before(phases[-1].end)

    def mixture(self, phase: PlannedPhase) -> DocumentMixture:
        return self._span_by_phase[phase.name].mixture

    def manifests(self) -> dict[str, Manifest]:
        """Return the manifest of every corpus that the run reads, by prefix."""
        return {
            prefix: manifest
            for span in self.spans
            for prefix, manifest in zip(span.mixture.prefixes, span.mixture.manifests, strict=True)
        }


def _spans_of_equal_data(phases: tuple[PlannedPhase, ...]) -> list[list[PlannedPhase]]:
    spans: list[list[PlannedPhase]] = []
    for phase in phases:
        same = spans and (spans[-1][0].corpora, spans[-1][0].sequence_length) == (phase.corpora, phase.sequence_length)
        if same:
            spans[-1].append(phase)
        else:
            spans.append([phase])
    return spans
