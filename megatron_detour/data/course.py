"""Which sequences each phase of a run reads: phases that read the same data go on in one order, and a phase with other
corpora or weights goes on in each corpus where the phases before it have stopped.

Where the sequence length changes, it goes on behind as many tokens, which is the same place to within a window of the
order (data/pack.py): inside that window packs of another length are other packs, and some documents come again while
others wait for the next epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_detour.config import Corpus
from megatron_detour.data.batches import Beginning, Sequences
from megatron_detour.data.manifest import Manifest
from megatron_detour.data.vocabulary import Vocabulary
from megatron_detour.plan import Plan, PlannedPhase


@dataclass(frozen=True)
class Segment:
    """Phases with the same data, one after the other, and their sequences."""

    corpora: tuple[Corpus, ...]
    sequences: Sequences


class Course:
    """The sequences of all phases of a plan."""

    def __init__(self, plan: Plan, order_seed: int, vocabulary: Vocabulary) -> None:
        prefixes = dict.fromkeys(corpus.prefix for phase in plan.phases for corpus in phase.corpora)
        seeds = {prefix: number for number, prefix in enumerate(prefixes)}
        tokens: dict[str, int] = {}  # of each corpus, padding included, read before the segment
        self.segments: list[Segment] = []
        self._of_phase: dict[str, Segment] = {}
        for run in _runs_of_equal_data(plan.phases):
            first, end = run[0], run[-1].end_sequence
            packs = {prefix: -(-read // first.sequence_length) for prefix, read in tokens.items()}
            beginning = Beginning(first.first_sequence, packs, seeds)
            sequences = Sequences(first.corpora, first.sequence_length, order_seed, vocabulary, beginning)
            segment = Segment(first.corpora, sequences)
            self.segments.append(segment)
            self._of_phase |= {phase.name: segment for phase in run}
            tokens |= {prefix: n * first.sequence_length for prefix, n in sequences.packs_read(end).items()}

    def of(self, phase: PlannedPhase) -> Sequences:
        return self._of_phase[phase.name].sequences

    def manifests(self) -> dict[str, Manifest]:
        """Of every corpus that the run reads, by prefix."""
        return {
            prefix: manifest
            for segment in self.segments
            for prefix, manifest in zip(segment.sequences.prefixes, segment.sequences.manifests, strict=True)
        }


def _runs_of_equal_data(phases: tuple[PlannedPhase, ...]) -> list[list[PlannedPhase]]:
    runs: list[list[PlannedPhase]] = []
    for phase in phases:
        same = runs and (runs[-1][0].corpora, runs[-1][0].sequence_length) == (phase.corpora, phase.sequence_length)
        if same:
            runs[-1].append(phase)
        else:
            runs.append([phase])
    return runs
