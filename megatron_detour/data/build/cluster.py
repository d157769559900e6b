"""The parts of a build as Ray tasks, on machines that share the file system of the input and the corpus."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from megatron_detour.data.build.engines import one_thread
from megatron_detour.data.build.journal import Counts
from megatron_detour.data.build.progress import BuildProgress
from megatron_detour.data.build.worker import Job, build_part
from megatron_detour.data.sources import Part
from megatron_detour.errors import DetourError

AT_ONCE = 2  # tasks for each processor, so that none waits for work


def run_on_ray(parts: list[Part], job: Job) -> Iterator[tuple[Part, Counts]]:
    """Yields parts as they are done, on the cluster that RAY_ADDRESS names or, without one, on this machine.

    Raises DetourError, and what a task raised.
    """
    try:
        import ray
    except ImportError:
        raise DetourError("--engine-cluster ray: needs the package: pip install 'megatron-detour[ray]'") from None
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(num_cpus=job.options.workers if job.options.workers > 1 else None, log_to_driver=False)
    task = ray.remote(num_cpus=1, max_retries=3)(_task)
    at_once = int(ray.cluster_resources().get("CPU", 1)) * AT_ONCE
    waiting: dict = {}
    left = list(reversed(parts))
    done_bytes = done_tokens = 0
    try:
        with BuildProgress(sum(part.size for part in parts)) as progress:
            while left or waiting:
                while left and len(waiting) < at_once:
                    part = left.pop()
                    waiting[task.remote(part, job)] = part
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


def _result(ray, reference) -> Counts:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def _task(part: Part, job: Job) -> Counts:
    one_thread()
    return build_part(part, job, functools.partial(_unheard))


def _unheard(read: int, tokens: int) -> None:
    """A task's progress is told when it is done."""
