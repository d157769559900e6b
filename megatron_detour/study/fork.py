"""Begin a run with another run's checkpoint, at the end of the phases that both have in common.

The state of a run is its weights, its optimizer's states and the tokens consumed, so the run goes on exactly as if it
had trained these phases itself (tests/study/test_fork.py compares the weights bit for bit).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from megatron_detour.checkpoint import store
from megatron_detour.errors import DetourError
from megatron_detour.files import aside_of, discard, flush, remove_abandoned
from megatron_detour.observe.sinks import read_metrics
from megatron_detour.run_directory import CHECKPOINTS, METRICS, RUN_FILE, claim
from megatron_detour.study.plan import StudyRun


def prepare(run: StudyRun) -> Path:
    """Write the run's folder, with its first checkpoint if it continues another run; return its run file.

    Does nothing if the folder has a run file. Raises DetourError if the other run has no such checkpoint.
    """
    run_file = run.folder / RUN_FILE
    if run_file.exists():
        return run_file
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(run.folder)
    aside = aside_of(run.folder, "writing")
    discard(aside)
    aside.mkdir()
    try:
        claim(aside, run.config, run.plan)
        if run.fork:
            _copy_state(run, aside)
        for path in (*aside.rglob("*"), aside):
            flush(path)
        aside.rename(run.folder)
    finally:
        discard(aside)
    return run_file


def _copy_state(run: StudyRun, folder: Path) -> None:
    fork = run.fork
    source = store.checkpoint_folder(fork.source.folder / CHECKPOINTS, fork.step)
    try:
        store.verify(source)
    except store.Broken as fault:
        raise DetourError(f"{run.name} continues {fork.source.name} at step {fork.step:,}, but {fault}") from None
    target = folder / CHECKPOINTS / source.name
    target.mkdir(parents=True)
    for path in source.iterdir():
        _link(path, target / path.name)
    kept = [record for record in read_metrics(fork.source.folder / METRICS) if record["step"] <= fork.step]
    (folder / METRICS).write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")


def _link(source: Path, target: Path) -> None:
    """Published files never change, so that both checkpoints may share them on the disk."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        target.write_bytes(source.read_bytes())
