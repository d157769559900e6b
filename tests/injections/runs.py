"""A small run of three phases that uses all that a resumed run could get wrong, its ranks as processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from safetensors.torch import load_file

from megatron_detour.checkpoint import store
from megatron_detour.observe.sinks import read_metrics
from tests.harness import ROOT, free_port
from tests.injections.rank import work as rank_work

INTERVAL = 3  # steps between checkpoints
PHASE_ENDS = (7, 14, 20)
PATIENCE = 240  # seconds for a session; far more than it takes


@dataclass(frozen=True)
class Setup:
    """How a run is split and in which type it is trained."""

    ranks: int = 1
    tensor: int = 1
    dtype: str = "fp32"

    def __str__(self) -> str:
        return f"TP{self.tensor} x DP{self.ranks // self.tensor} {self.dtype}"

    @property
    def overrides(self) -> list[str]:
        file = {"fp32": "zero2_fp32_cpu.json", "bf16": "zero2_bf16.json"}[self.dtype]
        return [f"parallel.tensor={self.tensor}", f"deepspeed={ROOT / 'ds_configs' / file}"]


SETUPS = [Setup(ranks, tensor, dtype) for ranks, tensor in ((1, 1), (2, 1), (4, 2)) for dtype in ("fp32", "bf16")]


def write_run_file(path: Path, prefix: str, tokenizer: Path, optimizer: str = "adamw") -> Path:
    """A growing batch and a mask ramp; a causal phase with a frozen bottom; a decay with the optimizer begun anew."""
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "local_attention": 32,
        "max_position_embeddings": 128,
    }
    warm = {"name": "warm", "objective": "mlm", "mask_rate": 0.3, "mask_rate_end": 0.2, "tokens": 4 * 512 + 3 * 256}
    warm |= {"batch_warmup": {"start": 4, "increment": 4, "tokens": 3 * 256}}
    content = {
        "name": "survivor",
        "folder": "set by the test",
        "model": {"config": shape, "tokenizer": str(tokenizer)},
        "data": {"corpora": [{"prefix": prefix}], "sequence_length": 64},
        "batch": {"sequences": 8, "micro_sequences": 2},
        "phases": [
            warm | {"learning_rate": {"peak": 1e-2, "warmup": "2 steps"}},
            {"name": "detour", "objective": "clm", "tokens": "7 steps", "freeze": ["embeddings", "layers.0"],
             "learning_rate": {"peak": 1e-2, "shape": "cosine", "end_ratio": 0.5}},
            {"name": "decay", "objective": "mlm", "mask_rate": 0.15, "whole_word_masking": True, "tokens": "6 steps",
             "optimizer_state": "reset", "sequence_length": 32, "sequences": 16,
             "learning_rate": {"peak": 1e-2, "shape": "1-sqrt", "end": 1e-3}},
        ],
        "optimizer": {"name": optimizer, "ema": 0.9},
        "deepspeed": "set by the test",
        "guards": {"spikes": "skip", "window": 16, "sigma": 3},
        "validation": {"corpora": [{"prefix": prefix}], "sequences": 4},
        "checkpoint": {"every": f"{INTERVAL} steps", "keep": 2},
        "tensorboard": False,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(content))
    return path


_ranks = multiprocessing.get_context("forkserver")
_ranks.set_forkserver_preload(["tests.injections.rank"])


@dataclass
class Session:
    """The processes of one start of a run, and what they print."""

    folder: Path
    setup: Setup
    processes: list[BaseProcess]
    log: Path

    def alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def joined(self) -> bool:
        """Whether the ranks know each other."""
        return "kernels" in self.output()

    def kill(self, ranks: list[int] | None = None, number: int = signal.SIGKILL) -> None:
        for rank in range(self.setup.ranks) if ranks is None else ranks:
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid, number)

    def wait(self, seconds: float = PATIENCE) -> list[int]:
        """The exit statuses, negative after a signal. Whatever lives longer is killed, and fails the caller."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0.01))
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        self.kill(late)
        assert not late, f"ranks {late} were still alive after {seconds} s: {self.output()[-3000:]}"
        orphans = [process for process in psutil.process_iter() if self._is_of(process)]
        for process in orphans:
            process.kill()
        assert not orphans, f"orphans: {orphans}"
        return [process.exitcode for process in self.processes]

    def _is_of(self, process: psutil.Process) -> bool:
        try:
            return (
                os.getsid(process.pid) in [p.pid for p in self.processes] and process.status() != psutil.STATUS_ZOMBIE
            )
        except (psutil.Error, OSError):  # it has just ended
            return False

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def records(self) -> list[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        return read_metrics(path) if path.exists() else []

    def step(self) -> int:
        """The last step that was recorded; -1 before anything was."""
        return max((record["step"] for record in self.records()), default=-1)

    def saving(self) -> bool:
        return any((self.folder / "checkpoints").glob(".step-*.writing-*"))


def begin(folder: Path, run_file: Path, setup: Setup, log: Path, overrides: Sequence[str] = (), **more: str) -> Session:
    """Starts the ranks of a run, as srun would; `more` are variables of rank.py."""
    shared = {"WORLD_SIZE": str(setup.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    arguments = ["--run-file", str(run_file), f"folder={folder}", *setup.overrides, *overrides]
    processes = []
    for rank in range(setup.ranks):
        own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | more
        process = _ranks.Process(target=rank_work, args=(own, str(log), arguments), daemon=True)
        process.start()
        processes.append(process)
    return Session(folder, setup, processes, log)


def figures(folder: Path) -> list[dict[str, Any]]:
    """All figures of all steps but those of time and memory."""
    of_machine = ("seconds", "tokens_per_second", "data_wait_seconds", "memory_bytes", "model_tflops", "mfu")
    records = read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key not in of_machine} for record in records]


def assert_same_run(ours: Path, theirs: Path, last: int = PHASE_ENDS[-1]) -> None:
    """Figures of every step, final weights and optimizer, all to the bit."""
    assert figures(ours) == figures(theirs)
    final = store.checkpoint_folder(Path("checkpoints"), last)
    for name in ("model.safetensors", "optimizer.safetensors"):
        mine, reference = load_file(ours / final / name), load_file(theirs / final / name)
        assert mine.keys() == reference.keys()
        assert [key for key in mine if not torch.equal(mine[key], reference[key])] == []
