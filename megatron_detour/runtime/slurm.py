"""Ranks that srun started directly, without torchrun or DeepSpeed's launcher."""

from __future__ import annotations

import re
from collections.abc import MutableMapping

PORTS = range(20000, 40000)


def join_slurm(environ: MutableMapping[str, str]) -> bool:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in a task of srun; return whether it is one.

    SLURM_PROCID and SLURM_NTASKS are also set in batch scripts and in shells of salloc, where there are no other tasks.
    SLURM_STEP_ID and SLURM_STEP_NUM_TASKS mark a step: Slurm sets the first only for regular steps (src/common/env.c:
    not for a negative id such as the batch script's), and srun sets the second to the number of tasks that it starts.
    A RANK that a launcher has set takes precedence, and so does a MASTER_ADDR or MASTER_PORT.
    """
    needed = ("SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID")
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if "RANK" in environ or not nodes or any(name not in environ for name in needed):
        return False
    environ["RANK"] = environ["SLURM_PROCID"]
    environ["WORLD_SIZE"] = environ["SLURM_STEP_NUM_TASKS"]
    environ["LOCAL_RANK"] = "0" if _has_own_gpu(environ) else environ["SLURM_LOCALID"]
    environ.setdefault("MASTER_ADDR", first_host(nodes))
    environ.setdefault("MASTER_PORT", str(PORTS[int(environ["SLURM_JOB_ID"]) % len(PORTS)]))
    return True


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm node list, where task 0 runs: node003 of node[003-005,9],gpu-a1."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def _has_own_gpu(environ: MutableMapping[str, str]) -> bool:
    """Return whether Slurm shows each task only its own GPU (--gpus-per-task=1), as device 0."""
    visible = environ.get("CUDA_VISIBLE_DEVICES", "")
    return environ.get("SLURM_GPUS_PER_TASK") == "1" and visible != "" and "," not in visible
