"""A worker process: one GPU, or some of the cores, and one job after another."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_detour.errors import DetourError
from megatron_detour.evaluation.examples import Dataset, read_dataset
from megatron_detour.evaluation.finetuning.protocol import FinetuneSettings
from megatron_detour.evaluation.results import Cell, Result
from megatron_detour.evaluation.task import Task

PR_SET_PDEATHSIG = 1  # see prctl(2)
PACKAGES = ("torch", "transformers", "tokenizers", "seqeval", "scikit-learn", "scipy")


@dataclass(frozen=True)
class Job:
    """One fine-tuning. `identity` holds hashes of everything that determines its scores."""

    cell: Cell
    path: Path
    task: Task
    data: Path
    settings: FinetuneSettings
    protocol: str
    identity: dict[str, str]
    cost: float  # relative to other jobs
    scratch: Path  # for temporary checkpoints


class Stopped(Exception):
    """The parent has asked the worker to stop."""


# Set in each worker by begin_worker; the parent reads the shares (fractions done) for its display.
_slot: int
_shares: Any
_stop: Any
_read: dict[str, Dataset] = {}  # by task name


def begin_worker(slots: Any, shares: Any, stop: Any, threads: int, parent: int) -> None:
    """Take a slot and its device before torch is imported; arrange to die with the parent."""
    global _slot, _shares, _stop
    _slot, device = slots.get()
    _shares, _stop = shares, stop
    os.environ["CUDA_VISIBLE_DEVICES"] = device
    os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # else its gradients differ between repetitions
    if not device:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # avoids a warning, since transformers imports DeepSpeed
    _end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _end_with(parent: int) -> None:
    """Kill this worker when its parent dies: a waiting worker would not notice."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)


def run_job(job: Job) -> tuple[Result, dict[str, Any]]:
    """Return the line for results.jsonl and the predictions. Raises DetourError."""
    import torch

    from megatron_detour.evaluation.finetuning.finetune import finetune

    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every shape, and texts have many
    dataset = _dataset(job.task, job.data)
    try:
        outcome = finetune(
            job.path,
            dataset,
            job.settings,
            job.cell.seed,
            shuffled=job.cell.shuffled,
            scratch=job.scratch,
            report=_report,
        )
    except torch.OutOfMemoryError:
        raise DetourError(
            f"GPU out of memory with {job.settings.batch} texts of {job.settings.max_length} tokens; lower it with "
            "--set batch=N or max_length=N"
        ) from None
    result = job.cell._asdict() | {
        "path": str(job.path),
        "protocol": job.protocol,
        "title": job.task.title,
        "language": job.task.language,
        "ner_head": job.settings.ner_head if job.task.kind.has_ner_head else None,
        "metric": job.task.metric,
        "score": outcome.scores[job.task.metric],
        "scores": outcome.scores,
        "dev_score": outcome.dev_score,
        "best_step": outcome.best_step,
        "steps": outcome.steps,
        "examples": outcome.examples,
        "cut": outcome.cut,
        "seconds": round(outcome.seconds, 1),
        "device": outcome.device,
        "attention": outcome.attention,
        "versions": {package: version(package) for package in PACKAGES},
        "identity": job.identity,
    }
    return result, {"labels": list(dataset.labels), "gold": outcome.gold, "predicted": outcome.predicted}


def _report(share: float) -> None:
    _shares[_slot] = share
    if _stop.is_set():
        raise Stopped


def _dataset(task: Task, data: Path) -> Dataset:
    """Read a dataset; cache the last one, since jobs of a task are consecutive."""
    if task.name not in _read:
        _read.clear()
        _read[task.name] = read_dataset(task, data)
    return _read[task.name]
