"""Time and memory of steps; contenders alternate, so that disturbances of the machine affect all of them."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.contenders import Contender

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MATRIX = {"cuda": 8192, "cpu": 2048}  # size of the matrix product for reference FLOP/s


@dataclass
class Figures:
    """Seconds of each step of a contender, and the peak memory of a step beyond what was allocated before."""

    contender: Contender
    seconds: list[float] = field(default_factory=list)
    bytes: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def take_turns(contenders: list[Contender], rounds: int, device: torch.device, say) -> list[Figures]:
    """Run one warm-up step of each contender, then `rounds` rounds of one step each."""
    all_figures = [Figures(contender) for contender in contenders]
    for number in range(rounds + 1):
        for figures in all_figures:
            seconds, held = _step(figures.contender, device)
            if number:
                figures.seconds.append(seconds)
                figures.bytes = held if held is None else max(held, figures.bytes or 0)
            say(f"round {number} of {rounds}: {figures.contender.name} {seconds:.2f} s")
    return all_figures


def _step(contender: Contender, device: torch.device) -> tuple[float, int | None]:
    for parameter in contender.model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # allocated beforehand, as in training
    gc.collect()
    before = _start_watching(device)
    started = time.perf_counter()
    contender.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started
    held = _most_held(device)
    for parameter in contender.model.parameters():
        parameter.grad = None
    return seconds, None if held is None or before is None else max(held - before, 0)


def _start_watching(device: torch.device) -> int | None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc: return what another contender freed to the system
    except (OSError, AttributeError):
        return None
    try:
        CLEAR.write_text("5")  # Linux: reset the peak
        return _status("VmRSS")
    except OSError:
        return None


def _most_held(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(key: str) -> int | None:
    if not STATUS.exists():
        return None
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large square matrix product on this device."""
    size = MATRIX[device.type]
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        for _ in range(4):
            torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, (time.perf_counter() - started) / 4)
    return 2 * size**3 / best
