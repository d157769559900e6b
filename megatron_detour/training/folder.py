"""A run's folder belongs to one run: the one that its run.yaml describes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from megatron_detour.config import RunConfig, flatten, from_dict
from megatron_detour.errors import DetourError
from megatron_detour.files import write_whole
from megatron_detour.plan import Plan
from megatron_detour.structured import read_json_object
from megatron_detour.training.lock import LOCK

LEFT_BY_A_KILL = {LOCK, ".run.yaml.part"}  # before there was a run.yaml


def refuse_another_run(folder: Path, config: RunConfig) -> None:
    """Raises DetourError when the folder holds another run, or anything but a run."""
    run_file = folder / "run.yaml"
    if run_file.exists() and not (folder / "metrics.jsonl").exists() and not (folder / "checkpoints").exists():
        return  # it never began
    if not run_file.exists():
        if folder.exists() and (
            not folder.is_dir() or any(path.name not in LEFT_BY_A_KILL for path in folder.iterdir())
        ):
            raise DetourError(f"{folder}: holds files but no run; choose another folder=... or empty it")
        return
    try:
        there = from_dict(yaml.safe_load(run_file.read_text(encoding="utf-8")), str(run_file)).trajectory()
    except yaml.YAMLError:
        raise DetourError(f"{run_file}: not a YAML file; choose another folder=...") from None
    here = config.trajectory()
    for key in [*here, *there]:
        if here.get(key) != there.get(key):
            raise DetourError(
                f"{folder}: this folder holds another run: {_spoken(key, config)} is {_shown(there, key)} there and "
                f"{_shown(here, key)} here; give the same settings to resume, choose another folder=... or remove it"
            )


def _shown(settings: dict[str, Any], key: str) -> str:
    value = settings.get(key)
    return "not set" if value is None else repr(value)


def _spoken(key: str, config: RunConfig) -> str:
    """phases.1.tokens as users write it: phases.decay.tokens."""
    first, _, rest = key.partition(".")
    number, _, last = rest.partition(".")
    if first == "phases" and int(number) < len(config.phases):
        return f"phases.{config.phases[int(number)].name}.{last}"
    return key


def is_finished(folder: Path, plan: Plan) -> bool:
    """Whether the last session wrote down that it reached the end of this plan, and the last checkpoint is there."""
    if not (folder / "checkpoints" / f"step-{plan.total_steps:08d}" / "files.json").is_file():
        return False
    try:
        return read_json_object(folder / "environment.json")["sessions"][-1].get("ended") == "finished"
    except (OSError, DetourError, LookupError, TypeError, AttributeError):  # a start looks closer and tells
        return False


def changed_settings(folder: Path, config: RunConfig) -> list[str]:
    """What the run file says otherwise than in the last session, without harm to the trajectory: a line each."""
    if not (folder / "environment.json").exists():
        return []  # no session has begun
    try:
        before = dict(flatten(from_dict(yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))).to_dict()))
    except (OSError, yaml.YAMLError, DetourError):
        return []
    now = dict(flatten(config.to_dict()))
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key) and key != "folder"]
    remarks = {
        "validation": "; validation figures before and after do not compare",
        "deepspeed": "; rounding may differ",
    }
    return [
        f"changed since the last session: {_spoken(key, config)} was {_shown(before, key)} and is {_shown(now, key)}"
        f"{remarks.get(key.partition('.')[0], '') if key != 'validation.every' else ''}"
        for key in keys
    ]


def take(folder: Path, config: RunConfig, plan: Plan) -> None:
    """Makes the folder this run's, once everything that the run needs is known to be there."""
    write_whole(folder / "run.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True))
    write_whole(folder / "plan.json", json.dumps(plan.to_dict(), indent=1) + "\n")


def add_session(folder: Path, session: dict[str, Any], facts: dict[str, Any]) -> None:
    """Writes environment.json: the list of sessions, one longer, and the facts of this one."""
    path = folder / "environment.json"
    earlier = json.loads(path.read_text(encoding="utf-8"))["sessions"] if path.exists() else []
    content = {"sessions": [*earlier, session], **facts}
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def end_session(folder: Path, how: str) -> None:
    """Notes how the last session ended."""
    path = folder / "environment.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["sessions"][-1]["ended"] = how
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
