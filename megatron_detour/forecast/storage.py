"""How often each corpus is read, and what a run writes to the disk."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron_detour.config import Corpus, RunConfig
from megatron_detour.data.manifest import read_manifest
from megatron_detour.errors import DetourError
from megatron_detour.plan import Plan

BESIDE = 8 * 10**6  # bytes of a checkpoint's tokenizer and small files
RECORD = 600  # bytes of a step in metrics.jsonl and in TensorBoard's file


@dataclass(frozen=True)
class Reading:
    """Of one corpus: tokens of the run that come from it, by phase, and tokens that it has (None: not there)."""

    prefix: str
    read: dict[str, float]
    tokens: int | None

    @property
    def epochs(self) -> float | None:
        return sum(self.read.values()) / self.tokens if self.tokens else None


@dataclass(frozen=True)
class Disk:
    """`checkpoints` at a time at most, one of them being written; all in bytes."""

    checkpoint: int
    checkpoints: int
    steps: int
    free: int | None

    @property
    def needed(self) -> int:
        return self.checkpoint * self.checkpoints + self.steps * RECORD


def readings(plan: Plan) -> list[Reading]:
    """Each corpus of the phases, in the order in which they first come."""
    read: dict[str, dict[str, float]] = {}
    for phase in plan.phases:
        whole = sum(corpus.weight for corpus in phase.corpora)
        for corpus in phase.corpora:
            mine = read.setdefault(corpus.prefix, {})
            mine[phase.name] = phase.tokens * corpus.weight / whole
    return [Reading(prefix, by_phase, tokens_of(prefix)) for prefix, by_phase in read.items()]


def tokens_of(prefix: str) -> int | None:
    try:
        return read_manifest(prefix).tokens
    except (DetourError, OSError):
        return None


def validation_tokens(corpora: tuple[Corpus, ...]) -> int | None:
    """Tokens of the held-out corpora together, None where one is not there."""
    found = [tokens_of(corpus.prefix) for corpus in corpora]
    return None if None in found else sum(found)


def disk(config: RunConfig, plan: Plan, parameters: int) -> Disk:
    """What stays: the start of a fresh model, phase boundaries, what passes a multiple of keep_every, the newest."""
    settings, total = config.checkpoint, plan.total_tokens
    kept = len(plan.phases) + (config.model.start is None)
    kept += total // settings.keep_every if settings.keep_every else 0
    passing = max(total // settings.every - kept, 0) if settings.every else 0
    size = config.optimizer.kind.bytes_per_parameter() * parameters + BESIDE
    return Disk(size, kept + min(settings.keep, passing), plan.total_steps, free_bytes(Path(config.folder)))


def free_bytes(folder: Path) -> int | None:
    """Free for a folder that may not be there yet."""
    there = next((place for place in (folder, *folder.absolute().parents) if place.exists()), None)
    try:
        return shutil.disk_usage(there).free if there else None
    except OSError:
        return None
