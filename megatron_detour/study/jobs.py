"""The jobs of a study, in an order in which each follows those that it needs.

A job is a training run, the fine-tuning of one model, or an analysis of one training seed. It can be killed and started
again at any point. jobs/NAME.json records how it ended, and under which versions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_detour.errors import DetourError, nearest
from megatron_detour.files import write_whole
from megatron_detour.structured import read_json_object
from megatron_detour.study import work
from megatron_detour.study.plan import Study, StudyRun, run_name
from megatron_detour.study.records import DONE, START

FAILED, SKIPPED = "failed", "skipped"
PACKAGES = ("megatron-detour", "torch", "transformers", "deepspeed")


@dataclass(frozen=True)
class Job:
    """`work` returns an exit status. `cost` estimates the time relative to other jobs of this kind."""

    name: str
    needs: tuple[str, ...]
    cost: float
    work: Callable[[], int]

    @property
    def kind(self) -> str:
        return self.name.partition("/")[0]


def jobs_of(study: Study) -> list[Job]:
    """Return all jobs, by training seed, so that an unfinished study has whole seeds."""
    jobs: list[Job] = []
    if study.config.evaluation and study.start:
        jobs.append(_evaluation(study, START, None, Path(study.start), ()))
    for seed in study.config.seeds:
        runs = [run for run in study.runs if run.seed == seed]
        jobs += [_training(study, run) for run in runs]
        if study.config.evaluation:
            jobs += [
                _evaluation(study, run.arm, seed, work.final_model(run), (_train(run),))
                for run in runs
                if study.config.arms[run.arm].evaluate
            ]
        jobs += _analyses(study, seed)
    return jobs


def find(jobs: list[Job], name: str) -> Job:
    for job in jobs:
        if job.name == name:
            return job
    raise DetourError(f"--job {name}: no such job{nearest(name, [job.name for job in jobs])}; --jobs list lists them")


def levels(jobs: list[Job]) -> list[list[Job]]:
    """Return the jobs in stages: those of a stage need jobs of earlier stages only."""
    depth: dict[str, int] = {}
    stages: list[list[Job]] = []
    for job in jobs:
        depth[job.name] = 1 + max((depth[name] for name in job.needs), default=-1)
        stages += [[] for _ in range(depth[job.name] + 1 - len(stages))]
        stages[depth[job.name]].append(job)
    return stages


def _train(run: StudyRun) -> str:
    return f"train/{run.name}"


def _training(study: Study, run: StudyRun) -> Job:
    needs = (_train(run.fork.source),) if run.fork else ()
    return Job(_train(run), needs, run.new_tokens, lambda: work.train(run, study.config.ranks))


def _evaluation(study: Study, arm: str, seed: int | None, model: Path, needs: tuple[str, ...]) -> Job:
    name = run_name(arm, seed)
    cost = len(study.tasks) * len(study.finetuning_seeds)
    return Job(f"evaluate/{name}", needs, cost, lambda: work.evaluate(study, name, model))


def _analyses(study: Study, seed: int) -> Iterator[Job]:
    """Yield a job per analysis of the study."""
    analyses = study.config.analyses
    if drift := analyses.drift:
        arms = dict.fromkeys([*drift.of, drift.reference, *([drift.noise] if drift.noise else [])])
        yield _analysis(study, "drift", seed, list(arms), work.drift)
    if persistence := analyses.persistence:
        yield _analysis(study, "persistence", seed, [persistence.arm, persistence.reference], work.persistence)
    if transplants := analyses.transplants:
        yield _analysis(study, "transplants", seed, [transplants.donor, transplants.recipient], work.transplants)
    if needle := analyses.needle:
        yield _analysis(study, "needle", seed, list(needle.of), work.needle)


def _analysis(
    study: Study, name: str, seed: int, arms: list[str], measure: Callable[[Study, int], list[dict[str, Any]]]
) -> Job:
    needs = tuple(_train(study.run(arm, seed)) for arm in arms)

    def write() -> int:
        lines = measure(study, seed)
        write_lines(study.folder / "analyses" / f"{name}-s{seed}.jsonl", lines)
        return 0

    return Job(f"{name}/s{seed}", needs, len(arms), write)


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines))


def record_of(study: Study, job: str) -> dict[str, Any] | None:
    """Return how a job ended: `status`, `message`, `seconds`; None if it has not ended."""
    path = _record(study, job)
    return read_json_object(path) if path.exists() else None


def installed_versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):  # of a checkout that was not installed
            found[package] = version(package)
    return found


def record(study: Study, job: str, **facts: Any) -> None:
    path = _record(study, job)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"job": job, **facts, "versions": installed_versions()}
    write_whole(path, json.dumps(content, ensure_ascii=False) + "\n")


def forget_failures(study: Study, jobs: list[Job]) -> None:
    """Let failed and skipped jobs run again."""
    for job in jobs:
        ended = record_of(study, job.name)
        if ended and ended["status"] != DONE:
            _record(study, job.name).unlink()


def _record(study: Study, job: str) -> Path:
    return study.folder / "jobs" / f"{job}.json"


def log_file(study: Study, job: str) -> Path:
    return study.folder / "logs" / f"{job}.log"
