"""The registration of a study: what was to be run and tested, written before the first result.

registration.json has the study file, every arm as it resolves, the hashes of start model, corpora and tasks, and one
SHA-256 over these. A study that differs from its registration is refused, or amended with a reason that every page
shows.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_detour.analysis.drift import draw_texts
from megatron_detour.analysis.needle_examples import refuse_few
from megatron_detour.config import flatten
from megatron_detour.data.manifest import read_manifest
from megatron_detour.errors import DetourError
from megatron_detour.evaluation.examples import read_dataset
from megatron_detour.evaluation.task_types.classification import Classification
from megatron_detour.files import file_facts, write_whole
from megatron_detour.run_directory import start_hash
from megatron_detour.settings import to_plain
from megatron_detour.structured import read_json_object
from megatron_detour.study.forecast import power_statement
from megatron_detour.study.jobs import installed_versions
from megatron_detour.study.plan import Study, StudyRun, held_out, text_files
from megatron_detour.study.records import FORMAT, REGISTRATION, RESULTS, read_registration

FREE = ("folder", "ranks")  # keys of the study file that change no result
SHOWN_CHANGES = 8


def register(study: Study, amend: str | None = None) -> dict[str, Any]:
    """Write the registration, or compare the study with it; return its content.

    Raises DetourError, naming the changed keys, for a study that differs from its registration without `amend`.
    """
    path, content = study.folder / REGISTRATION, describe(study)
    if not path.exists():
        _check_beginning(study)
        now = {"registered": _now(), "sha256": _hash(content), "amendments": []}
        _write(path, {"format": FORMAT} | now | content)
        return registered(study.folder)
    before = registered(study.folder)
    changes = _changes(before, content)
    if not changes:
        return before
    if amend is None:
        more = f", and {len(changes) - SHOWN_CHANGES} more" if len(changes) > SHOWN_CHANGES else ""
        raise DetourError(
            f"{path}: the study was registered on {before['registered'][:10]} and has changed since: "
            f"{'; '.join(changes[:SHOWN_CHANGES])}{more}. Undo the change, or give --amend 'REASON', which every page "
            "of the study will show"
        )
    amendment = {"when": _now(), "reason": amend, "changes": changes, "sha256": _hash(content)}
    amendments = [*before["amendments"], amendment]
    kept = {key: before[key] for key in ("format", "registered", "sha256")}
    _write(path, kept | {"amendments": amendments} | content)
    return registered(study.folder)


def registered(folder: Path) -> dict[str, Any]:
    """Return the registration as it is written. Raises DetourError if it is missing, damaged, or edited by hand."""
    read_registration(folder)
    path = folder / REGISTRATION
    content = read_json_object(path)
    described = {key: value for key, value in content.items() if key not in _OWN}
    latest = (content["amendments"] or [content])[-1]
    if latest.get("sha256", _hash(described)) != _hash(described):  # earlier versions' amendments have none
        raise DetourError(f"{path}: changed since it was written; restore the file")
    return content


def _check_beginning(study: Study) -> None:
    """Raise DetourError if the study has begun, and for what would stop it only after hours of training."""
    if begun := [name for name in ("runs", "evaluation", "jobs", RESULTS) if (study.folder / name).exists()]:
        raise DetourError(
            f"{study.folder}: has {begun[0]} and no {REGISTRATION}, so that nothing shows what was planned before the "
            "results; restore the file, or choose another folder"
        )
    analyses = study.config.analyses
    for analysis in filter(None, (analyses.drift, analyses.persistence)):
        texts = analysis.texts
        draw_texts([Path(file) for file in texts.files], texts.count, texts.draws)
    if analyses.needle:
        refuse_few(analyses.needle.options)
        if max(analyses.needle.options.lengths) > study.shape.max_positions:
            raise DetourError(
                f"analyses.needle.options.lengths: the longest input is {study.shape.max_positions:,} tokens"
            )
    if (transplants := analyses.transplants) and transplants.task:
        task = next(task for task in study.tasks if task.name == transplants.task)
        if not isinstance(task.kind, Classification):
            raise DetourError(
                f"analyses.transplants.task: a probe needs a task of type classification, not {task.type}"
            )


_OWN = ("format", "registered", "sha256", "amendments")


def describe(study: Study) -> dict[str, Any]:
    """Return everything that determines the study's results and verdicts, as JSON types."""
    plain = to_plain(study.config)
    facts: dict[str, Any] = {"start": start_hash(study.start), "corpora": _corpora(study.runs)}
    facts["versions"] = installed_versions()
    facts["validation"] = held_out(study.runs[0].config)
    facts["texts"] = {file: file_facts(Path(file))["sha256"] for file in text_files(study.config)}
    if study.config.evaluation:
        data = Path(study.config.evaluation.data)
        facts["protocol"] = {task.name: asdict(study.protocol.settings(task)) for task in study.tasks}
        facts["tasks"] = {task.name: read_dataset(task, data).sha256 for task in study.tasks}
        facts["finetuning_seeds"] = list(study.finetuning_seeds)
    return json.loads(
        json.dumps(
            {
                "name": study.config.name,
                "about": study.config.about,
                "study": {key: value for key, value in plain.items() if key not in FREE},
                "arms": {arm: _arm(study, study.run(arm, study.config.seeds[0])) for arm in study.config.arms},
                "runs": {run.name: run.config.trajectory() for run in study.runs},
                "depth": study.shape.layers,
                "facts": facts,
                "power": power_statement(study),
            }
        )
    )


def _arm(study: Study, run: StudyRun) -> dict[str, Any]:
    return {"about": study.config.arms[run.arm].about, "phases": run.config.to_dict()["phases"]}


def _corpora(runs: tuple[StudyRun, ...]) -> dict[str, Any]:
    """Return the hash and size of each corpus that is trained on or validated with."""
    prefixes = dict.fromkeys(
        corpus.prefix
        for run in runs
        for corpora in (*(phase.corpora for phase in run.plan.phases), run.config.validation.corpora)
        for corpus in corpora
    )
    found = {prefix: read_manifest(prefix) for prefix in prefixes}
    return {
        prefix: {"sha256": manifest.files["bin"]["sha256"], "documents": manifest.documents, "tokens": manifest.tokens}
        for prefix, manifest in found.items()
    }


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a line per changed setting; what follows from a setting is not listed again.

    Other versions of packages are no change (the page tells them), nor is a kind of fact that was not registered yet.
    """
    lines = []
    known = before["facts"].keys() - {"versions"}
    before, now = (each | {"facts": {key: each["facts"].get(key) for key in known}} for each in (before, now))
    for part in ("study", "facts", "runs"):
        old, new = dict(flatten(before.get(part), part)), dict(flatten(now.get(part), part))
        lines += [
            f"{key.removeprefix('study.')} was {old.get(key)!r} and is {new.get(key)!r}"
            for key in dict.fromkeys([*old, *new])
            if old.get(key) != new.get(key)
        ]
        if lines:
            return lines
    return lines


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
