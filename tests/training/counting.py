"""Counts of what a GPU is asked to do: by torch's profiler, or by a CUDA runtime that counts and computes nothing.

The latter is preloaded and exports `nullcuda_reset`, `nullcuda_note(name)` and `nullcuda_dump(path)`. As it returns no
numbers, backends cannot be compared with their references there, and Triton kernels are noted instead of launched.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_detour.model.compute import Compute

RUNTIME = ctypes.CDLL(None)
ONLY_COUNTS = hasattr(RUNTIME, "nullcuda_reset")
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
COPIES = ("Memcpy DtoD", "Memcpy HtoD", "Memcpy DtoH")


def counted(work: Callable[[], Any]) -> dict[str, int]:
    """Return the kernel launches, copies and waits for the device of `work`, which has been done before."""
    return _by_the_runtime(work) if ONLY_COUNTS else _by_the_profiler(work)


def _by_the_profiler(work: Callable[[], Any]) -> dict[str, int]:
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()  # cudaDeviceSynchronize, which WAITS leaves out
    names = [event.name for event in profiler.events()]
    counts = Counter(names)
    return {
        "launches": sum(counts[name] for name in LAUNCHES),
        "copies": sum(name.startswith(COPIES[0]) for name in names),
        "copies from the host": sum(name.startswith(COPIES[1]) for name in names),
        "waits": sum(counts[name] for name in WAITS) + sum(name.startswith(COPIES[2]) for name in names),
    }


def _by_the_runtime(work: Callable[[], Any]) -> dict[str, int]:
    RUNTIME.nullcuda_reset()
    work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "counts"
        RUNTIME.nullcuda_dump(str(path).encode())
        lines = (line.split(" ") for line in path.read_text().splitlines())
        counts = {words[0]: int(words[1]) for words in lines if len(words) == 2}
    return {
        "launches": counts["launches"],
        "copies": counts["d2d"],
        "copies from the host": counts["h2d_pinned"] + counts["h2d_pageable"],
        "waits": sum(counts[f"{what}_syncs"] for what in ("stream", "event", "device")) + counts["d2h"],
    }


def uncompared_compute() -> Compute:
    """Return torch's varlen attention and the Triton kernels without a comparison; launches of the latter are noted."""
    from triton.runtime.jit import JITFunction

    from megatron_detour.kernels.choose import triton_kernels
    from megatron_detour.model import backends

    names: dict[str, Any] = {}

    def note(self, *arguments, grid=None, warmup=False, **options) -> None:
        name = self.fn.__name__
        RUNTIME.nullcuda_note(names.setdefault(name, ctypes.create_string_buffer(name.encode())))

    JITFunction.run = note
    return Compute(backends._load("varlen", torch.device("cuda", 0), torch.bfloat16), triton_kernels())
