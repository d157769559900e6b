"""Memory, MFU and device name of a run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import sys

import torch
import torch.distributed as dist

from megatron_detour.model.peaks import peak_flops

PACKAGES = ("megatron-detour", "torch", "deepspeed", "transformers", "tokenizers", "safetensors", "numpy")


def memory_bytes(device: torch.device) -> int:
    """Return the peak memory so far in bytes: tensors on a GPU, or the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def utilization(flops_per_second: float, device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the fraction of the peak FLOP/s of all ranks' devices; None if the peak is unknown."""
    peak = peak_flops(device_name(device), dtype == torch.bfloat16)
    return peak and flops_per_second / (peak * dist.get_world_size())


def versions() -> dict[str, str]:
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"


def host_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
