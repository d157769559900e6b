"""How long a checkpoint blocks training, compared with DeepSpeed's, which blocks training while it is written."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import psutil
import torch

from benchmarks.train import SIZES
from megatron_detour.checkpoint import huggingface, store
from megatron_detour.checkpoint.state import TrainingState, gather, scatter
from megatron_detour.config import from_dict
from megatron_detour.config.deepspeed import read_deepspeed_config
from megatron_detour.errors import DetourError
from megatron_detour.model.families import read_shape
from megatron_detour.parallel.zero import Zero
from megatron_detour.settings import Choice, Flag, Range
from megatron_detour.training.checkpoints import Background
from megatron_detour.training.engine import create_engine, start_distributed
from megatron_detour.ui.tables import Table

SAMPLE_SECONDS = 0.05


HELP = "how long saving a checkpoint blocks training, compared with DeepSpeed"


@dataclass(frozen=True)
class Settings:
    folder: Annotated[Path, Flag("DIR"), "for both checkpoints, which are removed again"]
    size: Annotated[str, Choice(SIZES), "of the model"] = "large"
    layers: Annotated[int | None, Range(above=0), "fewer or more layers than the size has"] = None
    deepspeed: Annotated[str, "a DeepSpeed file"] = "ds_configs/zero2_fp32_cpu.json"
    rounds: Annotated[int, Range(above=0), "saves of each"] = 3


def run(settings: Settings, say: Callable[[str], None]) -> None:
    print(table(measure(settings)))


def measure(settings: Settings) -> list[tuple[str, str]]:
    """Return rows of a title and a figure. Raises DetourError if the disk is too small."""
    zero = _zero(settings)
    sizes = zero.module.shape.sizes
    size = 4 * (1 + len(zero.states)) * zero.module.shape.parameters
    settings.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(settings.folder).free
    if free < 2.5 * size:
        raise DetourError(
            f"--folder {settings.folder}: {free / 1e9:.1f} GB free, but {2.5 * size / 1e9:.1f} GB are required"
        )
    process, before = psutil.Process(), psutil.Process().memory_info().rss
    rows = [("checkpoint", f"{size / 1e9:.2f} GB"), ("process before", f"{before / 1e9:.2f} GB")]
    held, background = TrainingState(), Background()
    stalls, writes, peers = [], [], []
    with _Peak(process) as peak:
        reserving = _timed(lambda: held.reserve(sizes, zero.states, next(zero.module.parameters()).is_cuda))
        for _ in range(settings.rounds):
            began = time.perf_counter()
            gather(zero, held)
            background.submit(lambda: _publish(settings.folder / "ours", zero, held))
            stalls.append(time.perf_counter() - began)
            background.wait()
            writes.append(time.perf_counter() - began - stalls[-1])
    rows.append(("additional memory, ours", f"{(peak.bytes - before) / 1e9:.2f} GB"))
    before = process.memory_info().rss
    with _Peak(process) as peak:
        for _ in range(settings.rounds):
            peers.append(_timed(lambda: zero.engine.save_checkpoint(str(settings.folder / "deepspeed"), tag="peer")))
    for name in ("ours", "deepspeed"):
        shutil.rmtree(settings.folder / name)
    return [
        *rows,
        ("additional memory, DeepSpeed", f"{(peak.bytes - before) / 1e9:.2f} GB"),
        ("allocating buffers, during the first steps", f"{reserving:.2f} s"),
        ("training is blocked for", _seconds(stalls)),
        ("written in the background in", _seconds(writes)),
        ("blocked, as a fraction of that", f"{min(stalls) / min(writes):.1%}"),
        ("DeepSpeed's save_checkpoint", _seconds(peers)),
        ("DeepSpeed blocks longer by", f"{min(peers) / min(stalls):.1f} x"),
    ]


def table(rows: list[tuple[str, str]]) -> str:
    return Table(["", ""], rows, align="l").text()


class _Peak:
    """Peak memory of a process, sampled in a thread."""

    def __init__(self, process: psutil.Process) -> None:
        self.process, self.bytes = process, 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> _Peak:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            self.bytes = max(self.bytes, self.process.memory_info().rss)


def _zero(settings: Settings) -> Zero:
    """Return a model with random weights and optimizer states."""
    from transformers import ModernBertConfig

    changes = {"num_hidden_layers": settings.layers} if settings.layers else {}
    shape = read_shape(ModernBertConfig(**SIZES[settings.size] | changes).to_dict(), settings.size)
    config = from_dict(
        {
            "name": "benchmark",
            "folder": "unused",
            "model": {"start": "unused"},
            "data": {"corpora": [{"prefix": "unused"}], "sequence_length": 1024},
            "batch": {"sequences": 1},
            "phases": [{"name": "only", "objective": "clm", "tokens": "1 step", "learning_rate": {"peak": 1}}],
            "deepspeed": settings.deepspeed,
        }
    )
    state, _ = start_distributed(config)
    model = shape.build(state)
    zero = create_engine(model, config, read_deepspeed_config(settings.deepspeed), state)
    sizes, generator = shape.sizes, torch.Generator().manual_seed(0)

    def values(name: str) -> torch.Tensor:
        return torch.rand(sizes[name], generator=generator)

    scatter(zero, values, lambda _, name: values(name), dict.fromkeys(sizes, 1))
    return zero


def _publish(folder: Path, zero: Zero, held: TrainingState) -> None:
    def write(aside: Path) -> None:
        huggingface.save_weights(held.weights, aside, torch.float32)
        huggingface.write_checkpoint(aside, held, {"step": 0})

    store.publish(folder, write)


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _seconds(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f} s"
