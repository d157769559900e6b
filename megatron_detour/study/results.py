"""The results of a study: results.jsonl, one line per figure, collected from runs, evaluation and analyses.

With registration.json it is all that the page needs, and small enough for a repository: no weights, no texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_detour.errors import DetourError
from megatron_detour.evaluation.results import read_results
from megatron_detour.observe.sinks import read_metrics
from megatron_detour.run_directory import METRICS
from megatron_detour.structured import parse_json
from megatron_detour.study.jobs import FAILED, SKIPPED, Job, record_of, write_lines
from megatron_detour.study.plan import Study, StudyRun, run_name
from megatron_detour.study.records import DONE, RESULTS, START, read_records

LOSS = "val_mlm_loss"
Line = dict[str, Any]


def collect(study: Study, jobs: list[Job]) -> list[Line]:
    """Write results.jsonl from what the jobs have left so far; return its lines."""
    lines = [*_runs(study), *_scores(study), *_analyses(study), *_failures(study, jobs), *_versions(study, jobs)]
    write_lines(study.folder / RESULTS, lines)
    return lines


def read_lines(folder: Path) -> list[Line]:
    """Return the results with all their keys. Raises DetourError for a missing file, or a line that is no result."""
    path = folder / RESULTS
    if not path.is_file():
        raise DetourError(f"{path}: no such file; give the folder of a study that has results")
    read_records(folder)
    return _lines_of(path)


def _runs(study: Study) -> Iterator[Line]:
    for run in study.runs:
        ended = record_of(study, f"train/{run.name}")
        if (run.folder / METRICS).exists() and ended is not None:
            yield _run(run, ended) | {"parameters": study.shape.parameters}


def _run(run: StudyRun, ended: Line) -> Line:
    records = read_metrics(run.folder / METRICS)
    curve = [[record["tokens"], record[LOSS]] for record in records if record.get(LOSS) is not None]
    seconds = sum(
        record.get("seconds") or 0 for record in records if record["step"] > (run.fork.step if run.fork else 0)
    )
    by_tokens = dict(map(tuple, curve))
    return {
        "kind": "run",
        "arm": run.arm,
        "seed": run.seed,
        "status": ended["status"],
        "tokens": records[-1]["tokens"] if records else 0,
        "shared_tokens": run.fork.tokens if run.fork else 0,
        "seconds": round(seconds, 1),
        "loss": by_tokens.get(run.plan.total_tokens),
        "phases": [[phase.name, phase.start, phase.end, by_tokens.get(phase.end)] for phase in run.plan.phases],
        "curve": curve,
    }


def _scores(study: Study) -> Iterator[Line]:
    names = {run.name: (run.arm, run.seed) for run in study.runs} | {run_name(START, None): (START, None)}
    for cell, result in read_results(study.folder / "evaluation").items():
        if cell.model in names and not cell.shuffled:
            arm, seed = names[cell.model]
            yield {
                "kind": "score",
                "arm": arm,
                "seed": seed,
                "task": cell.task,
                "metric": result["metric"],
                "finetuning_seed": cell.seed,
                "score": result["score"],
                "seconds": round(result["seconds"], 1),
            }


def _analyses(study: Study) -> Iterator[Line]:
    for path in sorted((study.folder / "analyses").glob("*.jsonl")):
        yield from _lines_of(path)


def _lines_of(path: Path) -> list[Line]:
    return [parse_json(line, str(path)) for line in path.read_bytes().decode().split("\n") if line.strip()]


def _failures(study: Study, jobs: list[Job]) -> Iterator[Line]:
    for job in jobs:
        ended = record_of(study, job.name)
        if ended and ended["status"] in (FAILED, SKIPPED):
            yield {"kind": "failure", "job": job.name, "status": ended["status"], "message": ended["message"]}


def _versions(study: Study, jobs: list[Job]) -> Iterator[Line]:
    """Yield the versions of the jobs that are done, none if earlier versions of this project ran them all."""
    used: dict[str, list[str]] = {}
    for job in jobs:
        ended = record_of(study, job.name) or {}
        for package, version in ended.get("versions", {}).items() if ended.get("status") == DONE else ():
            used.setdefault(package, []).append(version)
    if used:
        yield {"kind": "versions", "versions": {package: sorted(set(own)) for package, own in used.items()}}
