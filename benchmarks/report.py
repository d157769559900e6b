"""The cost of reading a long run's files: report, comparison, resuming, TensorBoard's file. No model, no GPU.

The run is synthetic, with 100 validations. Each figure is measured in a new process.
"""

from __future__ import annotations

import json
import math
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from megatron_detour.observe.compare import write_comparison
from megatron_detour.observe.report import write_report
from megatron_detour.observe.sinks import MetricsFile, TensorBoardSink
from megatron_detour.settings import Flag, Range, validate
from megatron_detour.ui.tables import Table

TOKENS = 65_536  # per step
SEQUENCES, LENGTH = 64, 1024


HELP = "seconds and memory of reports, comparisons, resuming and TensorBoard's file by the length of a run"


@dataclass(frozen=True)
class Settings:
    steps: Annotated[tuple[Annotated[int, Range(least=100)], ...], "of a run"] = (10_000, 100_000, 1_000_000)
    folder: Annotated[
        Path | None, Flag("DIR"), "for the synthetic runs, 0.9 GB per million steps; a temporary folder unless set"
    ] = None


def run(settings: Settings, say: Callable[[str], None]) -> None:
    print(table(measure(settings)))


def measure(settings: Settings) -> list[tuple[str, ...]]:
    """Return rows of steps, task, seconds, CPU seconds, peak memory. Raises DetourError for too few steps."""
    validate(settings)
    rows = []
    for steps in settings.steps:
        with tempfile.TemporaryDirectory(dir=settings.folder) as made:
            make_run(Path(made) / "one", steps)
            shutil.copytree(Path(made) / "one", Path(made) / "two")
            for what in (report, compare, resume, tensorboard):
                seconds, busy, peak = _fresh(what, Path(made))
                figures = (f"{seconds:.1f} s", f"{busy:.1f} s", f"{peak / 2**20:,.0f} MiB")
                rows.append((f"{steps:,}", what.__name__, *figures))
    return rows


def table(rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    return Table(["steps", "what", "time", "CPU time", "peak memory"], rows, align="rlr").markdown()


def report(made: Path) -> None:
    write_report(made / "one")


def compare(made: Path) -> None:
    write_comparison([made / "one", made / "two"], made / "comparison")


def resume(made: Path) -> None:
    MetricsFile(made / "one" / "metrics.jsonl", 10**9).close()


def tensorboard(made: Path) -> None:
    """Write every step of the run."""
    sink = TensorBoardSink(made / "tensorboard", 0)
    with (made / "one" / "metrics.jsonl").open("rb") as lines:
        for line in lines:
            sink.write(json.loads(line))
    sink.close()


def make_run(folder: Path, steps: int) -> None:
    folder.mkdir()
    rate = {"peak": 5e-4, "warmup_tokens": TOKENS, "shape": "cosine", "end": 5e-5}
    sizes = {"sequences": SEQUENCES, "sequence_length": LENGTH, "learning_rate": rate}
    half = steps // 2
    phases = [
        {"name": name, "objective": kind, "first_step": first, "steps": count, "tokens": count * TOKENS, **sizes}
        | {"start_tokens": (first - 1) * TOKENS, "end_tokens": (first - 1 + count) * TOKENS}
        for name, kind, first, count in (("detour", "clm", 1, half), ("decay", "mlm", half + 1, steps - half))
    ]
    plan = {"name": folder.name, "total_steps": steps, "total_tokens": steps * TOKENS, "phases": phases}
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    (folder / "run.yaml").write_text(f"name: {folder.name}\n", encoding="utf-8")
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            file.write(json.dumps(_record(step, steps, half)) + "\n")


def _record(step: int, steps: int, half: int) -> dict[str, Any]:
    objective = "clm" if step <= half else "mlm"
    record = {
        "step": step,
        "tokens": step * TOKENS,
        "phase": "detour" if objective == "clm" else "decay",
        "objective": objective,
        "loss": 2 + 5 * math.exp(-9 * step / steps) + 0.1 * math.sin(step),
        "lr": 5e-4 * (1 - 0.9 * step / steps),
        "grad_norm": 0.8 + 0.1 * math.cos(step),
        "sequences": SEQUENCES,
        "labelled_tokens": TOKENS,
        "padding_share": 0.001,
        "data_crc": 1_000_003 * step,
        "tokens_per_second": 150_000 + 1000 * math.sin(step),
        "seconds": 0.43,
        "model_tflops": 160.0,
        "data_wait_seconds": 0.004,
        "memory_bytes": 41_300_000_000,
    }
    if step % max(1, steps // 100) == 0:
        record |= {"val_mlm_loss": 2.5, "val_mlm_accuracy": 0.5, "val_clm_loss": 3.5}
    return record


def _fresh(what: Callable[[Path], None], made: Path) -> tuple[float, float, int]:
    """Return seconds, CPU seconds and peak bytes, measured in a new process."""
    code = f"from benchmarks import report; report.watch(report.{what.__name__}, {str(made)!r})"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    seconds, busy, peak = output.split()
    return float(seconds), float(busy), int(peak)


def watch(what: Callable[[Path], None], made: str) -> None:
    """Print seconds, CPU seconds and peak bytes."""
    begun, busy = time.perf_counter(), time.process_time()
    what(Path(made))
    print(time.perf_counter() - begun, time.process_time() - busy, _peak())


def _peak() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # rusage would include the parent's memory before exec
        return 1024 * int(status.read_text(encoding="utf-8").partition("VmHWM:")[2].split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
