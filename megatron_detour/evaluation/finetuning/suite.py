"""Models x tasks x seeds: find the unfinished fine-tunings and run them on workers."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from megatron_detour.errors import DetourError, format_faults
from megatron_detour.evaluation.examples import Dataset, read_dataset
from megatron_detour.evaluation.finetuning.progress import SuiteProgress
from megatron_detour.evaluation.finetuning.protocol import Protocol
from megatron_detour.evaluation.finetuning.worker import Job, begin_worker, run_job
from megatron_detour.evaluation.models import check_model, fingerprint, weight_files
from megatron_detour.evaluation.results import Cell, Result, add_result, predictions_path, read_results
from megatron_detour.evaluation.task import Task

RESULT_FORMAT = 2  # part of a result's identity; increase it when results stop being comparable


@dataclass(frozen=True)
class Suite:
    """An evaluation and its output folder. `jobs` fine-tunings run concurrently, each on its own GPU."""

    models: dict[str, Path]
    tasks: tuple[Task, ...]
    data: Path
    protocol: Protocol
    seeds: tuple[int, ...]
    output: Path
    shuffled: bool = False
    jobs: int = 1
    devices: tuple[str, ...] = ()  # from CUDA_VISIBLE_DEVICES, one per job; empty: the CPU


def run_suite(suite: Suite) -> int:
    """Run the unfinished jobs, in an order that makes models comparable early; return how many were run.

    Raises DetourError, before training, listing every fault of models, tasks and earlier results.
    """
    datasets = _read_all(suite)
    done = read_results(suite.output)
    with _scratch(suite.output) as scratch:
        jobs = list(_jobs(suite, datasets, scratch))
        _refuse_mismatched(suite, jobs, done)
        todo = [job for job in jobs if not _is_done(suite.output, job, done)]
        for job in todo:
            done.pop(job.cell, None)  # its predictions are missing
        with SuiteProgress(jobs, done, suite.jobs) as progress:
            _run(suite, todo, progress)
    return len(todo)


def _read_all(suite: Suite) -> dict[str, Dataset]:
    """Read all datasets and check the models' folders. Raises one DetourError that lists every fault."""
    faults: list[str] = []
    datasets: dict[str, Dataset] = {}
    for task in suite.tasks:
        try:
            suite.protocol.settings(task)
            datasets[task.name] = read_dataset(task, suite.data)
        except DetourError as fault:
            faults.append(str(fault))
    for path in suite.models.values():
        try:
            check_model(path)
        except DetourError as fault:
            faults.append(str(fault))
    if faults:
        raise DetourError(format_faults(faults))
    return datasets


def _jobs(suite: Suite, datasets: dict[str, Dataset], scratch: Path) -> Iterator[Job]:
    identities = {name: fingerprint(path) for name, path in suite.models.items()}
    sizes = {name: sum(file.stat().st_size for file in weight_files(path)) for name, path in suite.models.items()}
    for seed in suite.seeds:
        for task in suite.tasks:
            settings = suite.protocol.settings(task)
            dataset = datasets[task.name]
            fixed = {
                "format": str(RESULT_FORMAT),
                "task": _hash(repr((task.type, task.metrics, sorted(task.fields.items()), task.labels))),
                "data": dataset.sha256,
                "protocol": _hash(msgspec.json.encode(settings).decode()),
            }
            for name, path in suite.models.items():
                yield Job(
                    cell=Cell(name, task.name, seed, suite.shuffled),
                    path=path,
                    task=task,
                    data=suite.data,
                    settings=settings,
                    protocol=suite.protocol.name,
                    identity=fixed | {"model": identities[name]},
                    cost=_cost(dataset, settings) * sizes[name],
                    scratch=scratch,
                )


def _cost(dataset: Dataset, settings: Any) -> float:
    """Return the number of forward passes, a training example counting three, for estimating the time left."""
    train = min(len(dataset.train), settings.train_examples or len(dataset.train))
    dev = min(len(dataset.dev), settings.dev_examples or len(dataset.dev))
    steps = settings.steps or settings.epochs * train / settings.batch
    validations = steps / settings.validate_every if settings.validate_every else settings.epochs
    return 3 * steps * settings.batch + validations * dev + len(dataset.test)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _refuse_mismatched(suite: Suite, jobs: list[Job], done: dict[Cell, Result]) -> None:
    """Raise DetourError if an existing result has a different model, task, data or protocol."""
    protocols = {result.get("protocol", "") for result in done.values()} - {suite.protocol.name}
    if protocols:
        raise DetourError(
            f"{suite.output}: contains results of protocol {protocols.pop()!r}, not {suite.protocol.name!r}; "
            "choose another --output"
        )
    for job in jobs:
        for cell, result in done.items():
            changed = _changed(job, cell, result.get("identity", {}))
            if changed:
                rename = "rename the model (--model NAME=DIR), " if changed == "model" else ""
                raise DetourError(
                    f"{suite.output}: the result for {cell} differs in its {changed}; choose another --output, "
                    f"{rename}or remove its lines from results.jsonl"
                )


def _changed(job: Job, cell: Cell, identity: dict[str, str]) -> str | None:
    """Return the part in which an earlier result differs from a job: model and task names must stay unique."""
    parts = ["model"] * (cell.model == job.cell.model) + ["format", "task", "data", "protocol"] * (
        cell.task == job.cell.task
    )
    return next((part for part in parts if identity.get(part) != job.identity[part]), None)


def _is_done(output: Path, job: Job, done: dict[Cell, Result]) -> bool:
    return job.cell in done and predictions_path(output, job.cell).exists()


def _run(suite: Suite, todo: list[Job], progress: SuiteProgress) -> None:
    """Run the jobs. A failed job does not stop the rest; all faults are raised at the end."""
    if not todo:
        return
    context = multiprocessing.get_context("spawn")
    workers = min(suite.jobs, len(todo))
    shares, stop = context.Array("d", workers), context.Event()  # fraction done of each worker's job
    slots = context.Queue()
    for slot in range(workers):
        slots.put((slot, suite.devices[slot % len(suite.devices)] if suite.devices else ""))
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    pool = ProcessPoolExecutor(workers, context, begin_worker, (slots, shares, stop, threads, os.getpid()))
    left, running = iter(todo), {}
    faults: list[str] = []
    try:
        while True:
            while len(running) < workers and (job := next(left, None)):
                running[pool.submit(run_job, job)] = job
            if not running:
                break
            finished, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            progress.show(_fractions(sorted(shares), list(running.values())))
            for future in finished:
                job = running.pop(future)
                try:
                    result, predictions = future.result()
                except BrokenProcessPool:
                    raise
                except Exception as fault:  # possibly a library's: the other jobs continue
                    kind = "" if isinstance(fault, DetourError) else f"{type(fault).__name__}: "
                    faults.append(f"{job.cell}: {kind}{fault}")
                    continue
                add_result(suite.output, result, predictions)
                progress.finished(job, result)
    except BrokenProcessPool:
        raise DetourError(
            "a worker process died, probably out of memory; finished results are kept: lower --jobs, or "
            "--set batch=N max_length=N"
        ) from None
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
    if faults:
        raise DetourError(format_faults(faults))


def _fractions(shares: list[float], running: list[Job]) -> dict[Cell, float]:
    """Assign fractions done to jobs. Workers do not report their job, so the oldest is assumed to be furthest."""
    return {job.cell: share for job, share in zip(running, reversed(shares), strict=False)}


@contextmanager
def _scratch(output: Path) -> Iterator[Path]:
    """Provide a folder for this process's checkpoints; first remove those of dead processes of this host."""
    parent, host = output / ".scratch", socket.gethostname()
    parent.mkdir(parents=True, exist_ok=True)
    for stale in parent.glob(f"{host}-*"):
        if not Path(f"/proc/{stale.name.removeprefix(f'{host}-')}").exists():
            shutil.rmtree(stale, ignore_errors=True)
    folder = parent / f"{host}-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # another process uses it
            parent.rmdir()


def visible_gpus() -> tuple[str, ...]:
    """Return the GPUs visible to this process, as named in CUDA_VISIBLE_DEVICES."""
    import torch

    named = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    return tuple(named or map(str, range(torch.cuda.device_count())))[: torch.cuda.device_count()]
