"""The parts of gpu-day, each in a process of its own: `python -m benchmarks.gpu_parts NAME SIZE RESULTS`.

A part writes its results after each figure, so that what was measured survives its time limit. Besides what is said
below, results may hold `rows` for the table of speeds, and a `remark` of one line.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks import checkpoints, contenders, train
from benchmarks.measure import matrix_rate
from benchmarks.workload import make_workload
from megatron_detour.commands import machine
from megatron_detour.errors import DetourError
from megatron_detour.files import write_whole
from megatron_detour.model import roofline
from megatron_detour.model.backends import FLASH
from megatron_detour.model.choose import choose_compute, run_sizes
from megatron_detour.model.families import Family, read_shape
from megatron_detour.model.peaks import chip
from megatron_detour.observe import meter
from megatron_detour.parallel.state import ParallelState

ROOT = Path(__file__).parents[1]
GIB = 1 << 30


@dataclass(frozen=True)
class Scale:
    """The sizes of a day."""

    size: str
    large: str
    lengths: tuple[int, ...]
    tokens: int  # of a micro-batch
    sweep: tuple[int, ...]
    copied: int  # bytes
    sequence: int  # of the training run
    step: int  # tokens


SCALES = {
    "base": Scale("base", "large", (1024, 8192), 32_768, (16_384, 65_536, 131_072), GIB, 1024, 131_072),
    "tiny": Scale("tiny", "tiny", (64, 128), 256, (128,), 1 << 20, 64, 256),
}


class Results(dict):
    """Figures, written to a file at each change that `save` follows."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def save(self, **figures: Any) -> None:
        self.update(figures)
        write_whole(self.path, json.dumps(self) + "\n")

    def add_row(self, row: dict[str, Any]) -> None:
        self.setdefault("rows", []).append(row)
        self.save()


def facts(scale: Scale, results: Results) -> None:
    """Versions, the driver and what doctor finds."""
    device = _device()
    found = [*machine.packages(), *machine.gpus(), machine.precision(), machine.collectives(), *machine.host()]
    results.save(
        device=meter.device_name(device),
        versions=meter.versions(),
        clocks=machine.clocks_and_limits(),
        doctor=[dataclasses.asdict(one) for one in found],
        remark=", ".join([meter.device_name(device), *machine.clocks_and_limits()]),
    )


def rates(scale: Scale, results: Results) -> None:
    """FLOP/s of products, bytes per second of copies, seconds of a launch."""
    device, dtype = _device(), _dtype()
    shape = _shape(scale.size)
    results.save(square=matrix_rate(device, dtype))
    sizes = {"Wqkv": 3 * shape.hidden, "Wo": shape.hidden, "Wi": 2 * shape.intermediate, "decoder": shape.vocabulary}
    for name, width in sizes.items():
        left = torch.randn(scale.tokens, shape.hidden, device=device, dtype=dtype)
        right = torch.randn(shape.hidden, width, device=device, dtype=dtype)
        seconds = _seconds(lambda left=left, right=right: left @ right)
        results.save(**{name: 2 * left.numel() * width / seconds})
    one = torch.empty(scale.copied, dtype=torch.uint8, device=device)
    other = torch.empty_like(one)
    results.save(copy=2 * scale.copied / _seconds(lambda: other.copy_(one)))
    host = torch.empty(scale.copied, dtype=torch.uint8, pin_memory=device.type == "cuda")
    results.save(host_to_device=scale.copied / _seconds(lambda: one.copy_(host, non_blocking=True)))
    small = torch.zeros(1, device=device)
    results.save(launch=_seconds(lambda: [small.add_(1) for _ in range(1000)]) / 1000)
    results.save(remark=f"{results['square'] / 1e12:,.0f} TFLOP/s, {results['copy'] / 1e12:.2f} TB/s")


def correct(scale: Scale, results: Results) -> None:
    """The tests marked gpu: how many passed, failed and were skipped, and which failed."""
    marker = "gpu" if torch.cuda.is_available() else "gpu and not gpu"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", marker, f"--junitxml={report}", "-p", "no:cacheprovider"]
        subprocess.run([*command, "tests/kernels", "tests/model", "tests/parallel", "tests/training"], cwd=ROOT)
        suite = xml.etree.ElementTree.parse(report).getroot().find("testsuite")
    counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    failed = [
        f"{case.get('classname')}::{case.get('name')}: {fault.get('message', '')[:300]}"
        for case in suite
        for fault in case
        if fault.tag in ("failure", "error")
    ]
    skipped = Counter(case.find("skipped").get("message") for case in suite if case.find("skipped") is not None)
    remark = ", ".join(f"{count} {name}" for name, count in counts.items())
    results.save(**counts, failed=failed, why_skipped=dict(skipped), remark=remark)


def audit(scale: Scale, results: Results) -> None:
    """Kernels of a micro-batch by time, the share of it in which the GPU is busy, and synchronizing calls."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    device = _device()
    mine = _contender(_setting(scale, "mlm", scale.lengths[0]), device)
    for _ in range(3):
        mine.step()
    _wait()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        mine.step()
        _wait()
    events = profiler.events()
    kernels = [event for event in events if event.device_type == DeviceType.CUDA]
    spent: Counter[str] = Counter()
    for event in kernels:
        spent[event.name] += event.time_range.elapsed_us()
    waits = Counter(event.name for event in events if "Synchronize" in event.name or event.name == "cudaMemcpy")
    results.save(kernels=len(kernels), waits=dict(waits), slowest=spent.most_common(25))
    if kernels:
        first, last = (
            min(event.time_range.start for event in kernels),
            max(event.time_range.end for event in kernels),
        )
        busy = sum(spent.values()) / (last - first)
        results.save(busy=busy, remark=f"{len(kernels):,} kernels, busy {busy:.0%}")


def base(scale: Scale, results: Results) -> None:
    """Speed by objective, length, attention and kernels, compiled, and by the size of the micro-batch."""
    for objective in ("mlm", "clm"):
        for length in scale.lengths:
            for attention, kernels in _backends():
                _try_row(results, _setting(scale, objective, length, attention=attention, kernels=kernels))
        if torch.cuda.is_available():
            _try_row(results, _setting(scale, objective, scale.lengths[0], compile=True))
    for tokens in scale.sweep:
        _try_row(results, _setting(scale, "mlm", scale.lengths[0], tokens=tokens))


def large(scale: Scale, results: Results) -> None:
    """Speed of large by objective and length."""
    for objective in ("mlm", "clm"):
        for length in scale.lengths:
            _try_row(results, _setting(scale, objective, length, size=scale.large))


def peers(scale: Scale, results: Results) -> None:
    """This project and transformers in turn on the same documents."""
    against = {"against": "transformers", "full": False}
    for attention in _peer_attentions():
        for length in scale.lengths:
            for objective in ("mlm", "clm"):
                _try_row(results, _setting(scale, objective, length, peer_attention=attention, **against))
    _try_row(results, _setting(scale, "mlm", scale.lengths[0], peer_compile=True, **against))


def repeat(scale: Scale, results: Results) -> None:
    """Whether ten steps give the same losses twice, and how long a checkpoint blocks."""
    device = _device()
    runs = [_ten_steps(_contender(_setting(scale, "clm", scale.lengths[0]), device)) for _ in range(2)]
    equal = sum(a == b for a, b in zip(*runs, strict=True))
    results.save(equal=equal, losses=runs, remark=f"{equal} of 10 losses bit-equal")
    name = "zero2_bf16" if device.type == "cuda" else "zero2_fp32_cpu"
    with tempfile.TemporaryDirectory() as folder:
        settings = checkpoints.Settings(
            size=scale.size, folder=Path(folder), deepspeed=f"ds_configs/{name}.json", rounds=2
        )
        results.save(checkpoint=dict(checkpoints.measure(settings)))


def training(scale: Scale, results: Results) -> None:
    """Sixty steps of MLM, CLM and MLM: speed, MFU and memory by phase; the losses after a kill and a resumption."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [_run_file(scale, Path(folder), name) for name in ("whole", "killed")]
        seconds, whole = _timed(lambda: _train(runs[0]))
        results.save(seconds=seconds, phases=_by_phase(whole), final_loss=whole[-1]["loss"])
        plan = [sys.executable, "-m", "megatron_detour", "plan", str(runs[0]), "--json"]
        forecast = json.loads(subprocess.run(plan, cwd=ROOT, capture_output=True, text=True).stdout)
        counted = max(phase["counted"] for phase in forecast["memory"].values())
        results.save(memory=max(step["memory_bytes"] for step in whole), memory_forecast=counted)
        _train(runs[1], kill_at=45)
        resumed = _train(runs[1])
        losses, again = ({step["step"]: step["loss"] for step in steps if "loss" in step} for steps in (whole, resumed))
        difference = max(abs(losses[number] - again[number]) for number in losses)
        speed = statistics.median(phase["tokens_per_second"] for phase in results["phases"].values())
        remark = f"{speed:,.0f} tokens/s; greatest difference of a loss after kill and resumption {difference:.1e}"
        results.save(difference_after_resuming=difference, remark=remark)


PARTS: dict[str, Callable[[Scale, Results], None]] = {
    "facts": facts,
    "rates": rates,
    "correct": correct,
    "audit": audit,
    "base": base,
    "train": training,
    "large": large,
    "peers": peers,
    "repeat": repeat,
}


def _device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    _wait()
    started = time.perf_counter()
    result = work()
    _wait()
    return time.perf_counter() - started, result


def _seconds(work: Callable[[], Any]) -> float:
    """Return the best of five, after a warm-up."""
    work()
    return min(_timed(work)[0] for _ in range(5))


def _backends() -> Iterator[tuple[str, str]]:
    if not torch.cuda.is_available():
        yield "sdpa", "plain"
        return
    yield from ((attention, "auto") for attention in (*FLASH, "sdpa"))
    yield from (("auto", kernels) for kernels in ("plain", "apex"))


def _peer_attentions() -> list[str]:
    from transformers.utils import is_flash_attn_2_available

    return ["sdpa", *(["flash_attention_2"] if torch.cuda.is_available() and is_flash_attn_2_available() else [])]


def _setting(scale: Scale, objective: str, length: int, **changes: Any) -> train.Measurement:
    """Return a measurement of a single micro-batch of documents as long as the sequence."""
    setting = train.Measurement(
        size=scale.size,
        objective=objective,
        sequence_length=length,
        dtype="bf16" if torch.cuda.is_available() else "fp32",
        tokens=scale.tokens,
        full=True,
        peer_batch=32,
    )
    setting = dataclasses.replace(setting, **changes)
    return dataclasses.replace(setting, micro_sequences=max(setting.tokens // length, 1))


def _try_row(results: Results, settings: train.Measurement) -> None:
    """Add the rows of a measurement, or why there are none."""
    try:
        measured = train.measure(settings, ParallelState(), _device(), print)
    except (DetourError, torch.OutOfMemoryError) as fault:
        asked = settings.attention != "auto" or settings.kernels != "auto" or settings.compile
        if asked or isinstance(fault, torch.OutOfMemoryError):
            results.setdefault("left_out", []).append(str(fault).splitlines()[0])
            results.save()
            return
        raise
    for row in measured["contenders"]:
        ours = row["name"].startswith("megatron_detour")
        results.add_row(
            {
                "size": settings.size,
                "contender": row["name"] + (", compiled" if settings.peer_compile and not ours else ""),
                "objective": settings.objective,
                "sequence_length": settings.sequence_length,
                "micro_tokens": settings.tokens,
                "attention": measured["attention"] if ours else settings.peer_attention,
                "kernels": measured["kernels"] if ours else "",
                "roofline": _roofline(settings, measured["attention"]) if ours else None,
                **{name: row[name] for name in ("tokens_per_second", "bytes", "share_of_matrix_rate", "times_as_fast")},
            }
        )


def _roofline(settings: train.Measurement, attention: str) -> float | None:
    """Return the tokens per second of full documents at the data sheet's rates; None for an unknown device."""
    sheet = chip(meter.device_name(_device()))
    if sheet is None or not settings.full or attention not in roofline.ATTENTION:
        return None
    lengths = (settings.sequence_length,) * (settings.tokens // settings.sequence_length)
    causal = settings.objective == "clm"
    labeled = settings.tokens - len(lengths) if causal else round(settings.mask_rate * settings.tokens)
    shape = _shape(settings.size)
    return settings.tokens / roofline.seconds(shape, lengths, causal, labeled, sheet, attention)


def _shape(size: str) -> Family:
    return read_shape(_config(size), size)


def _config(size: str) -> dict[str, Any]:
    return {"model_type": "modernbert", "vocab_size": 50_368, "pad_token_id": 1, **train.SIZES[size]}


def _contender(settings: train.Measurement, device: torch.device) -> contenders.Contender:
    work = make_workload(None, settings.objective, 0.3, settings.sequence_length, settings.tokens, True, seed=0)
    shape = _shape(settings.size)
    sizes = run_sizes(shape, 1, [(settings.sequence_length, settings.micro_sequences, work.causal)])
    compute = choose_compute("auto", "auto", "none", sizes, device, _dtype()).compute
    config = _config(settings.size)
    return contenders.ours(config, work, settings.micro_sequences, compute, ParallelState(), device, _dtype())[0]


def _ten_steps(contender: contenders.Contender) -> list[float]:
    optimizer = torch.optim.AdamW(contender.model.parameters(), lr=1e-4)
    losses = []
    for _ in range(10):
        losses.append(sum(contender.loss(batch).detach() for batch in contender.batches).item())
        contender.step()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def _run_file(scale: Scale, folder: Path, name: str) -> Path:
    """Write a run file of sixty steps and, the first time, its corpus; return its path."""
    from benchmarks.texts import invented
    from megatron_detour.corpus import BuildOptions, build_corpus
    from megatron_detour.corpus.train_tokenizer import train_tokenizer

    corpus = folder / "corpus"
    if not corpus.with_suffix(".bin").exists():
        texts = folder / "texts.jsonl"
        texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in islice(invented(0), 3000)))
        train_tokenizer([texts], folder / "tokenizer", 8192)
        build_corpus(BuildOptions(str(corpus), str(folder / "tokenizer"), (str(texts),)))
    rate = {"peak": 1e-4}
    phases = [
        {"name": name, "objective": objective, "tokens": "20 steps", "learning_rate": rate}
        for name, objective in (("start", "mlm"), ("detour", "clm"), ("decay", "mlm"))
    ]
    for phase in phases:
        phase |= {"mask_rate": 0.3} if phase["objective"] == "mlm" else {}
    gpu = torch.cuda.is_available()
    content = {
        "name": name,
        "folder": str(folder / name),
        "model": {"config": {"vocab_size": 50_368, **train.SIZES[scale.size]}, "tokenizer": str(folder / "tokenizer")},
        "data": {"corpora": [{"prefix": str(corpus)}], "sequence_length": scale.sequence},
        "batch": {
            "sequences": scale.step // scale.sequence,
            "micro_sequences": min(scale.tokens, scale.step) // scale.sequence,
        },
        "phases": phases,
        "checkpoint": {"every": "15 steps"},
        "deepspeed": f"ds_configs/{'zero2_bf16' if gpu else 'zero2_fp32_cpu'}.json",
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def _train(run_file: Path, kill_at: int | None = None) -> list[dict[str, Any]]:
    """Train to the end and return the metrics, or kill the run once it has `kill_at` records."""
    metrics = run_file.with_suffix("") / "metrics.jsonl"
    process = subprocess.Popen([sys.executable, "-m", "megatron_detour", "train", str(run_file)], cwd=ROOT)
    while process.poll() is None:
        if kill_at and metrics.exists() and len(metrics.read_text().splitlines()) >= kill_at:
            process.kill()
            process.wait()
            return []  # the last line may be cut
        time.sleep(0.2)
    if process.returncode:
        raise DetourError(f"training {run_file.name} ended with {process.returncode}")
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def _by_phase(steps: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return medians over the steps of each phase but its first five."""
    names = ("tokens_per_second", "mfu", "data_wait_seconds", "seconds")
    phases: dict[str, list[dict[str, Any]]] = {}
    for step in steps:
        if "phase" in step:
            phases.setdefault(step["phase"], []).append(step)
    return {
        phase: {name: statistics.median(step[name] for step in rows[5:]) for name in names if name in rows[0]}
        for phase, rows in phases.items()
    }


if __name__ == "__main__":
    PARTS[sys.argv[1]](SCALES[sys.argv[2]], Results(Path(sys.argv[3])))
