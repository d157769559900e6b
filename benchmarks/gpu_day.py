"""`megatron-detour gpu-day`: all GPU measurements, in ten minutes, in one JSON file.

Each part runs in a process of its own under its own time limit, and writes its results as it goes: a part that fails,
hangs or kills the device leaves what it had, and the next one starts. The file is rewritten whole after each.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_summary
from megatron_detour.errors import DetourError, command_line
from megatron_detour.files import write_whole
from megatron_detour.structured import read_json_object

ROOT = Path(__file__).parents[1]
LAST_LINES = 15  # of a failed part's output
CPU_PATIENCE = 10  # times as long for the size that is for trying the command, on any machine


@dataclass(frozen=True)
class Part:
    """A measurement of gpu_parts.py."""

    name: str
    seconds: int  # that it may take
    what: str

    def command(self, size: str, results: Path) -> list[str]:
        return [sys.executable, "-m", "benchmarks.gpu_parts", self.name, size, str(results)]


PARTS = (
    Part("facts", 15, "versions, driver, clocks, power limit"),
    Part("rates", 30, "matrix products, copies, launches"),
    Part("correct", 100, "the tests marked gpu"),
    Part("audit", 30, "kernels, busy share and synchronizations of one micro-batch"),
    Part("base", 120, "base: objectives, lengths, attention, kernels; tokens per micro-batch"),
    Part("train", 110, "60 steps of MLM, CLM, MLM; killed and resumed"),
    Part("large", 65, "large at the best settings"),
    Part("peers", 90, "transformers, padded and packed"),
    Part("repeat", 40, "whether ten steps repeat bit for bit; how long a checkpoint blocks"),
)


def run_day(
    output: Path,
    minutes: float,
    size: str,
    only: Sequence[str] | None = None,
    baseline: Path | None = None,
    say: Callable[[str], None] = print,
    parts: tuple[Part, ...] = PARTS,
) -> dict[str, Any]:
    """Run the parts, or `only` those named; return what `output` then holds.

    Raise DetourError for an unknown part, and a baseline or an output that cannot be read or written.
    """
    names = [part.name for part in parts]
    if unknown := sorted(set(only or ()) - set(names)):
        raise DetourError(f"--only: no part is called {unknown[0]!r}; the parts are {', '.join(names)}")
    before = read_json_object(baseline) if baseline else None
    if not output.absolute().parent.is_dir():
        raise DetourError(f"--output: no such folder: {output.absolute().parent}")
    deadline = time.monotonic() + 60 * minutes
    day: dict[str, Any] = {"size": size, "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "parts": {}}
    for part in parts:
        if only and part.name not in only:
            continue
        left = deadline - time.monotonic()
        if left < min(10, part.seconds):
            day["parts"][part.name] = {"status": "skipped", "why": "no time left"}
        else:
            say(f"{part.name}: {part.what}")
            limit = part.seconds * (CPU_PATIENCE if size == "tiny" else 1)
            day["parts"][part.name] = run_part(part, size, min(left, limit))
        say(f"{part.name}: {day['parts'][part.name]['status']}")
        write_whole(output, json.dumps(day, indent=1) + "\n")
    summary = gpu_summary.summarize(day, before)
    day["summary"] = summary.facts
    write_whole(output, json.dumps(day, indent=1) + "\n")
    say(summary.markdown)
    return day


def run_part(part: Part, size: str, limit: float) -> dict[str, Any]:
    """Run a part for at most `limit` seconds; return its status, results and, if it failed, its last lines."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        with (Path(folder) / "output").open("w+", errors="replace") as output:
            process = subprocess.Popen(
                part.command(size, results),
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            )
            try:
                status = "done" if process.wait(limit) == 0 else "failed"
            except subprocess.TimeoutExpired:
                status = "timed out"
            finally:
                _end(process)
            output.seek(0)
            lines = output.read().splitlines()
        figures = json.loads(results.read_text()) if results.exists() else {}
    record = {"status": status, "seconds": round(time.monotonic() - started, 1), "results": figures}
    return record if status == "done" else record | {"exit": process.returncode, "output": lines[-LAST_LINES:]}


def _end(process: subprocess.Popen) -> None:
    """Kill the process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(options: dict[str, Any]) -> int:
    """Run a day with the options of `megatron-detour gpu-day`; return 1 if a part failed or timed out."""
    if options["size"] != "tiny" and not torch.cuda.is_available():
        raise DetourError("gpu-day needs a GPU; --size tiny tries the command without one")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and end the running part
    paths = {name: Path(options[name]) for name in ("output", "baseline") if options[name]}
    day = run_day(**options | paths)
    return 0 if all(part["status"] in ("done", "skipped") for part in day["parts"].values()) else 1


if __name__ == "__main__":
    command_line(lambda: main(json.loads(sys.argv[1])))
