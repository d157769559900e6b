"""How often a run reads each corpus, and how much it writes to disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_detour.config import Corpus, RunConfig
from megatron_detour.data.manifest import read_manifest
from megatron_detour.errors import DetourError
from megatron_detour.plan import Plan
from megatron_detour.run_directory import free_bytes

BESIDE = 8 * 10**6  # bytes of a checkpoint's tokenizer and small files
RECORD = 600  # bytes per step in metrics.jsonl and in TensorBoard's file


@dataclass(frozen=True)
class Reading:
    """The tokens that a run reads from a corpus, by phase, and the tokens of the corpus (None if missing)."""

    prefix: str
    read: dict[str, float]
    tokens: int | None

    @property
    def epochs(self) -> float | None:
        return sum(self.read.values()) / self.tokens if self.tokens else None


@dataclass(frozen=True)
class Disk:
    """Disk usage of a run: sizes in bytes, and the maximum number of `checkpoints`, including the one being written."""

    checkpoint: int
    checkpoints: int
    steps: int
    free: int | None

    @property
    def needed(self) -> int:
        return self.checkpoint * self.checkpoints + self.steps * RECORD


def readings(plan: Plan) -> list[Reading]:
    """Return how each corpus is read, in order of first use."""
    read: dict[str, dict[str, float]] = {}
    for phase in plan.phases:
        whole = sum(corpus.weight for corpus in phase.corpora)
        for corpus in phase.corpora:
            read.setdefault(corpus.prefix, {})[phase.name] = phase.tokens * corpus.weight / whole
    return [Reading(prefix, by_phase, corpus_tokens(prefix)) for prefix, by_phase in read.items()]


def corpus_tokens(prefix: str) -> int | None:
    try:
        return read_manifest(prefix).tokens
    except (DetourError, OSError):
        return None


def validation_tokens(corpora: tuple[Corpus, ...]) -> int | None:
    """Return the tokens of all held-out corpora, or None if one is missing."""
    tokens = [corpus_tokens(corpus.prefix) for corpus in corpora]
    return None if None in tokens else sum(tokens)


def disk(config: RunConfig, plan: Plan, parameters: int) -> Disk:
    """Count kept checkpoints: the start of a new model, phase boundaries, multiples of keep_every, the newest."""
    settings, total = config.checkpoint, plan.total_tokens
    kept = len(plan.phases) + (config.model.start is None)
    kept += total // settings.keep_every if settings.keep_every else 0
    passing = max(total // settings.every - kept, 0) if settings.every else 0
    size = config.optimizer.bytes_per_parameter * parameters + BESIDE
    return Disk(size, kept + min(settings.keep, passing), plan.total_steps, free_bytes(Path(config.folder)))
