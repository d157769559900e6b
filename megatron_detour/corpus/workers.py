"""Running the parts of a build in worker processes, or as tasks of a cluster."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any

from megatron_detour.corpus.journal import Counts, Journal
from megatron_detour.corpus.options import BuildOptions
from megatron_detour.corpus.progress import BuildProgress, say
from megatron_detour.corpus.sources import Part
from megatron_detour.corpus.worker import Job, Stopped, begin_worker, build_part, too_many_rejects
from megatron_detour.errors import DetourError

QUEUED_PER_WORKER = 4  # parts


def run_parts(parts: list[Part], job: Job, journal: Journal) -> None:
    """Build the unfinished parts. Raises DetourError, including for too many rejects."""
    rejects, todo = _Rejects(job.options), []
    for part in parts:
        if counts := journal.finished(part):
            rejects.add(part, counts)
        else:
            todo.append(part)
    if len(todo) < len(parts):
        say(f"{len(parts) - len(todo):,} of {len(parts):,} parts are already finished")
    if job.options.engine_cluster:
        from megatron_detour.corpus.ray_workers import run_on_ray

        for part, counts in run_on_ray(todo, job):
            rejects.add(part, counts)
    elif todo:
        _run_here(todo, job, rejects)


def _run_here(parts: list[Part], job: Job, rejects: _Rejects) -> None:
    context = multiprocessing.get_context("spawn")
    bytes_read, tokens, stop = context.Value("q", 0), context.Value("q", 0), context.Event()
    workers = min(job.options.workers, len(parts))
    shared = (job, bytes_read, tokens, stop)
    pool = ProcessPoolExecutor(workers, context, _begin, shared)
    waiting: dict[Future, Part] = {}
    left = iter(parts)
    try:
        with BuildProgress(sum(part.size for part in parts)) as progress:
            while True:
                for part in islice(left, workers * QUEUED_PER_WORKER - len(waiting)):
                    waiting[pool.submit(_build_part, part)] = part
                if not waiting:
                    break
                done, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                progress.show(bytes_read.value, tokens.value)
                for future in done:
                    rejects.add(waiting.pop(future), future.result())
    except BrokenProcessPool:
        raise DetourError("a worker process died, most likely out of memory; use fewer --workers") from None
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


class _Rejects:
    """Counts the rejects of all parts against --max-rejects."""

    def __init__(self, options: BuildOptions) -> None:
        self._options = options
        self._count = 0

    def add(self, part: Part, counts: Counts) -> None:
        """Raise DetourError, with the place of a record, once there are too many."""
        self._count += len(counts.rejects)
        if self._count > self._options.max_rejects:
            raise too_many_rejects(part, counts, self._options)


# Set in each worker by _begin; the counters are shared with the parent's display.
_shared: tuple[Job, Any, Any, Any]


def _begin(job: Job, bytes_read: Any, tokens: Any, stop: Any) -> None:
    global _shared
    _shared = (job, bytes_read, tokens, stop)
    begin_worker(job)


def _build_part(part: Part) -> Counts:
    job, bytes_read, tokens, stop = _shared

    def report(read: int, written: int) -> None:
        if stop.is_set():
            raise Stopped
        for value, more in ((bytes_read, read), (tokens, written)):
            if more:
                with value.get_lock():
                    value.value += more

    return build_part(part, job, report)
