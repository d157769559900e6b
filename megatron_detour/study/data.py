"""A study's registration and results, arranged by arm, training seed and task."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from megatron_detour.analysis.drift import ratio_of, regions_of
from megatron_detour.errors import DetourError
from megatron_detour.study.records import (
    LOSS,
    PARTS,
    START,
    ArmFacts,
    DriftRecord,
    Layers,
    NeedleRecord,
    PersistenceRecord,
    Record,
    Registration,
    RunRecord,
    ScoreRecord,
    TransplantRecord,
    VerdictRecord,
    VersionsRecord,
    read_records,
    read_registration,
)
from megatron_detour.study.statistics import Comparison, compare, compare_values

T = TypeVar("T", bound=Record)


@dataclass(frozen=True)
class StudyData:
    registration: Registration
    records: list[Record]

    @classmethod
    def read(cls, folder: Path) -> StudyData:
        """Raises DetourError for missing or damaged files, and for results of arms that are not registered."""
        data = cls(read_registration(folder), read_records(folder))
        known = {*data.registration.arms, START}
        named = [getattr(record, key, START) for record in data.records for key in ("arm", "donor", "recipient")]
        if unknown := [arm for arm in named if arm not in known]:
            raise DetourError(f"{folder}: results of {unknown[0]!r}, which is not an arm of the registration")
        depths = {len(table[0]) for record in data.records for table in _tables(record)}
        if wrong := depths - {data.registration.depth}:
            raise DetourError(
                f"{folder}: results of {min(wrong)} layers, and the registered encoder has {data.registration.depth}"
            )
        return data

    def of(self, kind: type[T]) -> list[T]:
        return [record for record in self.records if isinstance(record, kind)]

    def setting(self, *keys: str) -> Any:
        """Return a value of the study file, None where a mapping on the way is missing."""
        value: Any = self.registration.study
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    @cached_property
    def arms(self) -> dict[str, ArmFacts]:
        """The arms, in the order of the study."""
        found = self.registration.arms
        return {arm: found[arm] for arm in dict.fromkeys([*(self.setting("arms") or ()), *found]) if arm in found}

    @cached_property
    def seeds(self) -> list[int]:
        """Training seeds, in the order of the study."""
        found = [record.seed for record in self.of(RunRecord) + self.of(ScoreRecord) if record.seed is not None]
        return list(dict.fromkeys([*(self.setting("seeds") or ()), *sorted(found)]))

    @cached_property
    def tasks(self) -> list[str]:
        """Tasks that have a score, in the order of the study."""
        found = dict.fromkeys(record.task for record in self.of(ScoreRecord))
        planned = [Path(str(task)).stem for task in self.setting("evaluation", "tasks") or ()]
        return [task for task in dict.fromkeys([*planned, *found]) if task in found]

    @cached_property
    def metrics(self) -> dict[str, str]:
        return {record.task: record.metric for record in self.of(ScoreRecord)}

    @cached_property
    def runs(self) -> dict[tuple[str, int], RunRecord]:
        return {(run.arm, run.seed): run for run in self.of(RunRecord)}

    def runs_of(self, arm: str) -> list[RunRecord]:
        return [self.runs[arm, seed] for seed in self.seeds if (arm, seed) in self.runs]

    @cached_property
    def control(self) -> str | None:
        """The arm that others are compared with: the reference of an analysis, `control`, or the only control."""
        named = [self.setting("analyses", analysis, "reference") for analysis in ("drift", "persistence")]
        controls = [arm for arm in self.arms if self.setting("arms", arm, "control") is not None]
        candidates = [arm for arm in [*named, "control", *controls] if arm in self.arms]
        return candidates[0] if candidates else None

    @cached_property
    def finetuning_seeds(self) -> list[int]:
        return sorted({record.finetuning_seed for record in self.of(ScoreRecord)})

    @cached_property
    def _scores(self) -> dict[str, np.ndarray]:
        size = len(self.tasks), len(self.seeds), len(self.finetuning_seeds)
        places = [{x: i for i, x in enumerate(axis)} for axis in (self.tasks, self.seeds, self.finetuning_seeds)]
        tables: dict[str, np.ndarray] = {}
        for record in self.of(ScoreRecord):
            shape = (size[0], 1, size[2]) if record.seed is None else size
            table = tables.setdefault(record.arm, np.full(shape, np.nan))
            seed = 0 if record.seed is None else places[1][record.seed]
            table[places[0][record.task], seed, places[2][record.finetuning_seed]] = record.score
        return tables

    def scores(self, arm: str) -> np.ndarray | None:
        """Return scores [tasks, training seeds, fine-tuning seeds], NaN where missing; None without any.

        The start model has one training seed.
        """
        return self._scores.get(arm)

    @cached_property
    def scored(self) -> list[str]:
        """The start model and the arms that have scores."""
        return [arm for arm in [START, *self.arms] if arm in self._scores]

    @cached_property
    def common_tasks(self) -> list[int]:
        """Tasks, as indices, that all of `scored` have, so that means over them are comparable."""
        found = np.array([~np.isnan(table).all((1, 2)) for table in self._scores.values()])
        return np.flatnonzero(found.all(0)).tolist() if len(found) else []

    def seed_means(self, arm: str) -> dict[int | None, float]:
        """Return the mean over the common tasks by training seed; seeds without one of them are left out."""
        table = self.scores(arm)
        if table is None or not self.common_tasks:
            return {}
        seeds = [None] if arm == START else self.seeds
        means = task_means(table[self.common_tasks]).mean(0)
        return {seed: float(mean) for seed, mean in zip(seeds, means, strict=True) if not np.isnan(mean)}

    def difference(self, arm: str, task: int | None = None) -> Comparison | None:
        """Compare an arm with the control: on one task, or on the mean of the common tasks. None without pairs."""
        a, b = self.scores(arm), self.scores(self.control or "")
        if a is None or b is None or arm == self.control:
            return None
        chosen = self.common_tasks if task is None else [task]
        a, b = np.broadcast_to(a, b.shape)[chosen], b[chosen]
        return None if np.isnan(a - b).all() else compare(a, b)

    @cached_property
    def finished(self) -> list[RunRecord]:
        return [run for run in self.runs.values() if run.finished]

    def losses(self, arm: str, *, before_last_phase: bool = False) -> dict[int, float]:
        """Return the losses by training seed, at the end or at that of the phase before the last."""
        runs = {run.seed: run.loss_before_last_phase if before_last_phase else run.loss for run in self.runs_of(arm)}
        return {seed: loss for seed, loss in runs.items() if loss is not None}

    def figures(self, measure: str, arm: str) -> dict[int, float]:
        """Return an arm's figures of LOSS or NEEDLE by training seed."""
        if measure == LOSS:
            return self.losses(arm)
        return {seed: record.accuracy for seed, record in self.needles.get(arm, {}).items()}

    def difference_of(self, measure: str, arm: str) -> Comparison | None:
        """Compare an arm's LOSS or NEEDLE with the control's, paired by training seed. None without pairs."""
        own, control = (self.figures(measure, each) for each in (arm, self.control or ""))
        shared = [seed for seed in own if seed in control]
        if not shared or arm == self.control:
            return None
        return compare_values([own[seed] for seed in shared], [control[seed] for seed in shared])

    @cached_property
    def versions(self) -> dict[str, list[str]]:
        """The versions of each package: the registered one first, then those of the results."""
        used = {package: own for record in self.of(VersionsRecord) for package, own in record.versions.items()}
        registered = self.registration.facts.versions
        return {
            package: list(
                dict.fromkeys([*([registered[package]] if package in registered else []), *used.get(package, ())])
            )
            for package in [*registered, *(package for package in used if package not in registered)]
        }

    @cached_property
    def verdicts(self) -> dict[str, VerdictRecord | None]:
        """The verdict of each criterion, None before it is judged."""
        found = {verdict.criterion: verdict for verdict in self.of(VerdictRecord)}
        return {name: found.get(name) for name in dict.fromkeys([*(self.setting("criteria") or ()), *found])}

    @cached_property
    def drifts(self) -> dict[str, list[SeedDrift]]:
        """Divergence and noise by arm: one per training seed."""
        found: dict[str, list[SeedDrift]] = {}
        latest = {(record.arm, record.seed): record for record in self.of(DriftRecord)}
        for arm in self.arms:
            rows = [SeedDrift.from_record(record) for (own, _), record in latest.items() if own == arm]
            found |= {arm: rows} if rows else {}
        return found

    @cached_property
    def persistence(self) -> dict[str, list[PersistenceRecord]]:
        latest = {(record.arm, record.seed): record for record in self.of(PersistenceRecord) if record.points}
        return {arm: rows for arm in self.arms if (rows := [r for (own, _), r in latest.items() if own == arm])}

    @cached_property
    def needles(self) -> dict[str, dict[int, NeedleRecord]]:
        """Results of the needle test by arm and training seed."""
        found: dict[str, dict[int, NeedleRecord]] = {}
        for record in self.of(NeedleRecord):
            found.setdefault(record.arm, {})[record.seed] = record
        return {arm: found[arm] for arm in self.arms if arm in found}

    @cached_property
    def transplants(self) -> dict[tuple[str, str, str], dict[str, dict[int, float]]]:
        """Scores by (donor, recipient, task), parts (in the order of PARTS) and training seed.

        Where `task` is LOSS they are not scores but losses.
        """
        found: dict[tuple[str, str, str], dict[str, dict[int, float]]] = {}
        for record in sorted(self.of(TransplantRecord), key=lambda record: PARTS.index(record.parts)):
            for task, figure in ((record.task, record.score), (LOSS, record.loss)):
                if figure is not None:
                    key = record.donor, record.recipient, task
                    found.setdefault(key, {}).setdefault(record.parts, {})[record.seed] = figure
        return found


@dataclass(frozen=True)
class SeedDrift:
    """Means over draws, [layers], of one training seed."""

    seed: int
    divergence: np.ndarray
    noise: np.ndarray | None

    @classmethod
    def from_record(cls, record: DriftRecord) -> SeedDrift:
        noise = None if record.noise is None else np.mean(record.noise, 0)
        return cls(record.seed, np.mean(record.divergence, 0), noise)

    def ratio(self) -> np.ndarray:
        """Return divergence / noise [layers], NaN where unknown."""
        return np.full(self.divergence.shape, np.nan) if self.noise is None else ratio_of(self.divergence, self.noise)

    def region(self, layers: range) -> tuple[float, float, float]:
        """Return divergence, noise and ratio of a region, as means over its layers; NaN where unknown."""
        own = float(self.divergence[layers].mean())
        noise = np.nan if self.noise is None else float(self.noise[layers].mean())
        return own, noise, float(ratio_of(own, noise))


def share_kept(record: PersistenceRecord, layers: range) -> float:
    """Return a region's divergence at the last checkpoint as a share of that at the first; NaN where that is 0."""
    points = sorted(record.points)
    first, last = (float(np.mean(table, 0)[layers].mean()) for _, table in (points[0], points[-1]))
    return last / first if first > 0 else np.nan


def regions(data: StudyData) -> dict[str, range]:
    """Return the layers of `low`, `mid`, `deep` and `all`."""
    return regions_of(data.registration.depth)


def _tables(record: Record) -> list[Layers]:
    """Return the tables [draws][layers] of a result."""
    if isinstance(record, DriftRecord):
        return [table for table in (record.divergence, record.noise) if table is not None]
    return [table for _, table in record.points] if isinstance(record, PersistenceRecord) else []


def last_tokens(phase: dict[str, Any]) -> int:
    return int(phase.get("tokens") or 0)


def decay_sweeps(data: StudyData) -> list[list[str]]:
    """Return groups of arms that differ only in the tokens of their last phase, by these tokens."""
    groups: dict[str, dict[int, str]] = {}
    for arm, facts in data.arms.items():
        if not facts.phases:
            continue
        last = {key: value for key, value in facts.phases[-1].items() if key != "tokens"}
        own = [data.setting("arms", arm, "seed_offset") or 0]
        own += [pair for pair in (data.setting("arms", arm, "set") or {}).items() if not pair[0].startswith("phases.")]
        key = repr([[sorted(phase.items()) for phase in facts.phases[:-1]], sorted(last.items()), own])
        groups.setdefault(key, {}).setdefault(last_tokens(facts.phases[-1]), arm)
    return [[group[tokens] for tokens in sorted(group)] for group in groups.values() if len(group) > 1]


def task_means(table: np.ndarray) -> np.ndarray:
    """Return means over fine-tuning seeds [tasks, training seeds], NaN where there are none."""
    count = (~np.isnan(table)).sum(2)
    return np.where(count > 0, np.nansum(table, 2) / np.maximum(count, 1), np.nan)
