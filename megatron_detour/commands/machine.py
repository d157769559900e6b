"""Checks of this machine. None of them contacts another machine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from packaging.requirements import Requirement

from megatron_detour.errors import DetourError
from megatron_detour.kernels.check import Sizes
from megatron_detour.kernels.choose import choose_kernels
from megatron_detour.model.backends import choose_attention
from megatron_detour.model.compiled import check_compiled
from megatron_detour.model.families import Family
from megatron_detour.text import visible

OK, NOTE, FAULT = "ok", "note", "fault"
GIB = 1 << 30
OPTIONAL = ("flash_attn", "flash_attn_interface", "fast_layer_norm", "triton", "wandb")
WRITTEN = 64 << 20  # bytes written to measure disk speed
SLOW_DISK = 50e6  # bytes per second
OPEN_FILES, SHARED_MEMORY = 4096, GIB
CPU_BF16 = ("avx512_bf16", "amx_bf16", "bf16")  # the last is Arm's


@dataclass(frozen=True)
class CheckResult:
    """A line of the doctor. `remedy` says what to do about a note or a fault, if anything can be done."""

    state: str
    what: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return visible(f"{self.state:5}  {self.what:13} {'; '.join(filter(None, [self.text, self.remedy]))}")


def check(good: bool, what: str, text: str, remedy: str, otherwise: str = NOTE) -> CheckResult:
    """Return OK if `good`, else `otherwise` with the remedy."""
    return CheckResult(OK, what, text) if good else CheckResult(otherwise, what, text, remedy)


def packages() -> Iterator[CheckResult]:
    """Check Python and libraries against the versions that setup.py requires."""
    yield CheckResult(OK, "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    try:
        wanted = importlib.metadata.requires("megatron-detour") or []
    except importlib.metadata.PackageNotFoundError:
        yield CheckResult(
            NOTE,
            "packages",
            "megatron-detour is not installed, so versions were not checked",
            "run make install",
        )
        return
    fitting, unfit = [], []
    for requirement in map(Requirement, wanted):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        good = version is not None and requirement.specifier.contains(version, prereleases=True)
        (fitting if good else unfit).append((requirement, version))
    yield CheckResult(OK, "packages", ", ".join(f"{requirement.name} {version}" for requirement, version in fitting))
    for requirement, version in unfit:
        text = f"{requirement.name} {version or 'is missing'}"
        yield CheckResult(FAULT, "packages", text, f"pip install '{requirement.name}{requirement.specifier}'")
    available = [f"{name} {'yes' if importlib.util.find_spec(name) else 'no'}" for name in OPTIONAL]
    yield CheckResult(OK, "optional", ", ".join(available))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpus() -> Iterator[CheckResult]:
    driver = Path("/proc/driver/nvidia/version")
    if not torch.cuda.is_available():
        if torch.version.cuda or torch.version.hip:
            what = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
            remedy = "if this machine has a GPU, check nvidia-smi and CUDA_VISIBLE_DEVICES; runs use the CPU"
            yield CheckResult(NOTE, "GPU", f"torch {torch.__version__}, built for {what}, sees none", remedy)
        elif driver.exists():
            remedy = "install a CUDA build of torch"
            yield CheckResult(
                FAULT, "GPU", f"a driver is installed, but torch {torch.__version__} is a CPU build", remedy
            )
        else:
            yield CheckResult(OK, "GPU", "none; runs use the CPU")
        return
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        text = f"{number}: {torch.cuda.get_device_name(number)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        yield check(free > 0.9 * total, "GPU", text, "another process uses the rest: see nvidia-smi")
    yield from (CheckResult(OK, "driver", line) for line in clocks_and_limits())
    yield from _triton_compiler()


def clocks_and_limits() -> list[str]:
    """Return what nvidia-smi says of each GPU: driver, greatest clocks in MHz, power limit in W; [] without it."""
    fields = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines()] if done.returncode == 0 else []


def _triton_compiler() -> Iterator[CheckResult]:
    """Check for what Triton compiles its launchers with, at the first use of a kernel."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", ""), "gcc", "clang", "cc"))), None)
    remedy = "Triton compiles kernels with it: install gcc, or set CC"
    yield check(compiler is not None, "C compiler", compiler or "none on the PATH", remedy)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    remedy = "Triton's launchers include it: install the headers of this Python (python3-dev)"
    yield check(header.exists(), "Python headers", str(header), remedy)


def precision(deepspeed: dict[str, Any] | None = None) -> CheckResult:
    """Whether bf16 is computed or emulated; under a DeepSpeed file of fp32 that does not matter."""
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return check(native, "bf16", "native" if native else "not native", "use fp32, or an Ampere or later GPU")
    native = any(flag in _cpu_flags() for flag in CPU_BF16)
    remedy = "use deepspeed=ds_configs/zero2_fp32_cpu.json"
    if not native and deepspeed and not deepspeed.get("bf16", {}).get("enabled"):
        return CheckResult(OK, "bf16", "emulated on this CPU; the run computes in fp32")
    return check(native, "bf16", "native on this CPU" if native else "emulated on this CPU, which is slow", remedy)


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    flags = (line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features")))
    return set(next(flags, []))


def compute(
    attention: str = "auto", kernels: str = "auto", dtype: torch.dtype | None = None, sizes: Sizes | None = None
) -> Iterator[CheckResult]:
    """Select attention and kernels as a run would, comparing each with its reference implementation."""
    device = _device()
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        name, _, skipped = choose_attention(attention, device, dtype, sizes or Sizes())
        yield CheckResult(OK, "attention", name)
        yield from (CheckResult(NOTE, "attention", f"skipped: {why}") for why in skipped)
    except DetourError as fault:
        yield CheckResult(FAULT, "attention", str(fault))
    try:
        name, _, slower = choose_kernels(kernels, device, dtype, sizes or Sizes())
        yield CheckResult(OK, "kernels", name)
        if slower:
            yield CheckResult(NOTE, "kernels", f"skipped: {slower}")
    except DetourError as fault:
        yield CheckResult(FAULT, "kernels", str(fault))


def compiler(shape: Family, recompute: str, dtype: torch.dtype, sizes: Sizes) -> CheckResult:
    """Compile a layer and compare it with a plain one."""
    try:
        check_compiled(shape, sizes, recompute, _device(), dtype)
    except DetourError as fault:
        return CheckResult(FAULT, "compile", str(fault))
    return CheckResult(OK, "compile", "a compiled layer equals a plain one")


def _device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def collectives() -> CheckResult:
    if torch.cuda.is_available():
        available = dist.is_available() and dist.is_nccl_available()
        text = f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if available else "torch has no NCCL"
        return check(available, "collectives", text, "install a CUDA build of torch for Linux", FAULT)
    available = dist.is_available() and dist.is_gloo_available()
    text = "gloo" if available else "torch has no gloo"
    return check(available, "collectives", text, "install a build of torch with gloo", FAULT)


def host() -> Iterator[CheckResult]:
    """Check cores, memory, limits, launchers and the batch system."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = 2 * max(torch.cuda.device_count(), 1)
    remedy = f"request at least {wanted} (--cpus-per-task) to keep the GPUs busy"
    few = torch.cuda.is_available() and cores < wanted
    yield check(not few, "cores", f"{cores}", remedy)
    memory = psutil.virtual_memory()
    yield CheckResult(OK, "memory", f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free")
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = files == resource.RLIM_INFINITY
    limit = "unlimited" if unlimited else f"{files:,}"
    yield check(unlimited or files >= OPEN_FILES, "open files", limit, "run ulimit -n 65536 first")
    yield from _shared_memory()
    launchers = [name for name in ("deepspeed", "torchrun") if shutil.which(name)]
    remedy = "activate the environment in which megatron-detour is installed"
    yield check(bool(launchers), "launcher", ", ".join(launchers) or "none on the PATH", remedy, FAULT)
    names = ("JOB_ID", "NTASKS", "GPUS_ON_NODE", "CPUS_PER_TASK", "MEM_PER_NODE")
    slurm = [f"{name} {os.environ[f'SLURM_{name}']}" for name in names if f"SLURM_{name}" in os.environ]
    yield CheckResult(OK, "Slurm", ", ".join(slurm) or "not in a job")


def _shared_memory() -> Iterator[CheckResult]:
    shared = Path("/dev/shm")
    if not shared.is_dir():
        if sys.platform == "linux":
            yield CheckResult(FAULT, "shared memory", "/dev/shm does not exist, but NCCL and gloo use it", "mount it")
        return
    size = shutil.disk_usage(shared)
    remedy = "NCCL needs more: start the container with --shm-size=8g"
    severity = FAULT if torch.cuda.device_count() > 1 and size.free < SHARED_MEMORY / 4 else NOTE
    text = f"{size.free / GIB:.1f} GiB free in /dev/shm"
    yield check(size.free >= SHARED_MEMORY, "shared memory", text, remedy, severity)


def disk(folder: Path, needed: int = 0) -> CheckResult:
    """Check free space and measure write speed. `needed`: bytes that the run will write."""
    existing = next((place for place in (folder, *folder.absolute().parents) if place.is_dir()), Path.cwd())
    free = shutil.disk_usage(existing).free
    if free < max(needed, 2 * WRITTEN):
        remedy = f"{needed / 1e9:.1f} GB needed: free some space, or set another folder=..."
        return CheckResult(FAULT, "disk", f"{existing}: {free / 1e9:.1f} GB free", remedy)
    content = os.urandom(WRITTEN)
    try:
        with tempfile.NamedTemporaryFile(dir=existing) as file:
            started = time.perf_counter()
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            speed = WRITTEN / (time.perf_counter() - started)
    except OSError as error:
        return CheckResult(FAULT, "disk", f"{existing}: not writable: {error.strerror}", "set another folder=...")
    text = f"{existing}: {free / 1e9:.1f} GB free, {speed / 1e6:,.0f} MB/s written"
    return check(speed >= SLOW_DISK, "disk", text, "checkpoints will be slow: increase checkpoint.every")
