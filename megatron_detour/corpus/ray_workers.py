"""Running the parts of a build as Ray tasks, on machines that share the file system of input and corpus."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_detour.corpus.engines import one_thread
from megatron_detour.corpus.journal import Counts
from megatron_detour.corpus.progress import BuildProgress
from megatron_detour.corpus.sources import Part
from megatron_detour.corpus.worker import Job, build_part
from megatron_detour.errors import DetourError

TASKS_PER_CPU = 2  # so that none waits for work


def run_on_ray(parts: list[Part], job: Job) -> Iterator[tuple[Part, Counts]]:
    """Yield parts as they finish, on the cluster of RAY_ADDRESS or, if it is not set, on this machine.

    Raises DetourError, or the error of a task.
    """
    try:
        import ray
    except ImportError:
        raise DetourError("--engine-cluster ray: requires ray: pip install 'megatron-detour[ray]'") from None
    started_here = not ray.is_initialized()
    if started_here:
        here = "RAY_ADDRESS" not in os.environ
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry unless enabled
        workers = job.options.workers if here else None
        ray.init(num_cpus=workers, log_to_driver=False, include_dashboard=False if here else None)
    task = ray.remote(num_cpus=1, max_retries=3)(_task)
    max_tasks = int(ray.cluster_resources().get("CPU", 1)) * TASKS_PER_CPU
    waiting: dict = {}
    left = list(reversed(parts))
    done_bytes = done_tokens = 0
    try:
        with BuildProgress(sum(part.size for part in parts)) as progress:
            while left or waiting:
                while left and len(waiting) < max_tasks:
                    part = left.pop()
                    waiting[task.remote(_absolute_part(part), _absolute_job(job))] = part
                for reference in ray.wait(list(waiting))[0]:
                    part = waiting.pop(reference)
                    counts = _result(ray, reference)
                    done_bytes, done_tokens = done_bytes + part.size, done_tokens + counts.tokens
                    progress.show(done_bytes, done_tokens)
                    yield part, counts
    finally:
        for reference in waiting:
            ray.cancel(reference, force=False)
        if started_here:
            ray.shutdown()


def _result(ray: Any, reference: Any) -> Counts:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, DetourError | OSError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise DetourError(f"--engine-cluster ray: a task was lost: {error}") from None


def _absolute_part(part: Part) -> Part:
    """Tasks run in another working directory. The key is unchanged: paths are part of it as the user wrote them."""
    shards = [replace(s, path=str(Path(s.path).absolute())) if Path(s.path).exists() else s for s in part.shards]
    return replace(part, shards=tuple(shards))


def _absolute_job(job: Job) -> Job:
    options = replace(job.options, output_prefix=str(Path(job.options.output_prefix).absolute()))
    return replace(job, options=options, tokenizer_file=str(Path(job.tokenizer_file).absolute()))


def _task(part: Part, job: Job) -> Counts:
    one_thread()
    return build_part(part, job, _no_progress)


def _no_progress(read: int, tokens: int) -> None:
    """No-op progress callback."""
