"""Running a builder in a separate process, optionally on one core or with its memory monitored."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks import builders
from megatron_detour.errors import DetourError

WATCH_SECONDS = 0.05
ROOT = Path(__file__).parents[1]
# One thread per library, as they share one core; and no network access.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def cores() -> set[int]:
    """The cores that this process may use; none where the system does not tell."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


@contextlib.contextmanager
def on_core(core: int | None) -> Iterator[None]:
    """Processes started within run on that core."""
    before = cores()
    if core is not None:
        os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        if core is not None:
            os.sched_setaffinity(0, before)


def run_builder(python: str, job: dict[str, Any], core: int | None, watched: bool = False) -> dict[str, Any]:
    """What the builder of a job (builders.py) tells; `watched` adds its "peak". Raises DetourError if it fails.

    Its folder is made in job["scratch"] and removed afterwards.
    """
    with tempfile.TemporaryDirectory(dir=job["scratch"]) as folder, tempfile.TemporaryFile("w+") as told:
        command = [python, str(Path(builders.__file__)), json.dumps(job | {"folder": folder})]
        with on_core(core):
            os.sync()  # what the one before left to be written is not this one's load
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=told, text=True, env=_environment(python, folder)
            )
        with process:
            peak = _watch(process) if watched else {}
            output, _ = process.communicate()
        if process.returncode:
            told.seek(0)
            last = ([line for line in told.read().splitlines() if line.strip()] or ["no word"])[-1]
            raise DetourError(f"{job['builder']}: failed in {python}: {last}")
    return json.loads(output.splitlines()[-1]) | ({"peak": peak} if watched else {})


def _environment(python: str, folder: str) -> dict[str, str]:
    environment = {**os.environ, **ENVIRONMENT, "HF_DATASETS_CACHE": folder}
    if python == sys.executable:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    else:
        environment.pop("PYTHONPATH", None)
    return environment


def _watch(process: subprocess.Popen) -> dict[str, int]:
    """Peak resident bytes until the process ends, of itself ("parent") and of its greatest child ("worker")."""
    peak = {"parent": 0, "worker": 0}
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            parent = psutil.Process(process.pid)
            peak["parent"] = max(peak["parent"], parent.memory_info().rss)
            for child in parent.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    peak["worker"] = max(peak["worker"], child.memory_info().rss)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(WATCH_SECONDS)
    return peak
