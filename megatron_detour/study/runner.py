"""Run a study's jobs on this machine, several at once if asked, each in a process of its own."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_detour.errors import EXIT_INTERRUPTED, DetourError
from megatron_detour.evaluation.finetuning.suite import visible_gpus
from megatron_detour.study.forecast import seconds_left
from megatron_detour.study.jobs import FAILED, SKIPPED, Job, log_file, record, record_of
from megatron_detour.study.plan import Study
from megatron_detour.study.records import DONE
from megatron_detour.study.results import collect
from megatron_detour.ui.format import duration

LAST_WORDS = 300  # characters of a failed job's log


class Runner:
    """Starts each job once what it needs is done. A failed job is recorded, and what needs it is skipped."""

    def __init__(self, study: Study, jobs: list[Job], parallel: int) -> None:
        self.study, self.jobs, self.parallel = study, jobs, parallel
        self.ended = {job.name: record_of(study, job.name) for job in jobs}
        self._gpus = visible_gpus() if parallel > 1 else ()
        self._processes: dict[int, subprocess.Popen] = {}  # by slot
        self._stopped = False
        self._began = time.monotonic()

    def run(self) -> int:
        """Return 0 if every job is done, 1 if some failed, EXIT_INTERRUPTED if stopped by a signal."""
        with _only_one(self.study.folder), self._signals(), ThreadPoolExecutor(self.parallel) as pool:
            waiting = [job for job in self.jobs if not self.ended[job.name]]
            running: dict[Future[int], tuple[Job, int, float]] = {}
            free = list(range(self.parallel))
            while (waiting or running) and not (self._stopped and not running):
                while free and not self._stopped and (job := self._next(waiting)):
                    slot = free.pop(0)
                    print(f"{_clock(self._began)}  {job.name}: started", flush=True)
                    running[pool.submit(self._start, job, slot)] = (job, slot, time.monotonic())
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job, slot, started = running.pop(future)
                    free.append(slot)
                    self._finish(job, future.result(), time.monotonic() - started)
        if self._stopped:
            return EXIT_INTERRUPTED
        return 0 if all(ended and ended["status"] == DONE for ended in self.ended.values()) else 1

    def _next(self, waiting: list[Job]) -> Job | None:
        """Take the first job whose needs are done; skip those whose needs failed."""
        for job in list(waiting):
            ended = [self.ended[name] for name in job.needs]
            failed = next((n for n, e in zip(job.needs, ended, strict=True) if e and e["status"] != DONE), None)
            if failed:
                waiting.remove(job)
                self._record(job, SKIPPED, f"needs {failed}, which did not finish", 0.0)
            elif all(ended):
                waiting.remove(job)
                return job
        return None

    def _start(self, job: Job, slot: int) -> int:
        log = log_file(self.study, job.name)
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "megatron_detour", "study", str(self.study.path), "--job", job.name]
        with log.open("ab") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=output, env=self._environment(slot), start_new_session=True
            )
            self._processes[slot] = process
            if self._stopped:
                _stop(process)
            return process.wait()

    def _environment(self, slot: int) -> dict[str, str]:
        """Give each job that runs beside others its own GPUs, or its share of the cores."""
        environment = dict(os.environ)
        if devices := self._gpus:
            own = devices[slot :: self.parallel] or devices[slot % len(devices) :][:1]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        threads = max(1, len(os.sched_getaffinity(0)) // self.parallel)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
        return environment

    def _finish(self, job: Job, status: int, seconds: float) -> None:
        if self._stopped or status == EXIT_INTERRUPTED:
            self._stopped = True
            return
        if status == 0:
            self.ended[job.name] = record_of(self.study, job.name)
            left = seconds_left(self.jobs, self.ended)
            ending = f"; {duration(left / self.parallel)} left" if left else ""
            print(f"{_clock(self._began)}  {job.name}: done in {duration(seconds)}{ending}", flush=True)
        else:
            log = log_file(self.study, job.name)
            self._record(job, FAILED, _last_words(log) or f"exit status {status}", seconds)
            print(f"{_clock(self._began)}  {job.name}: FAILED, see {log}", flush=True)
        collect(self.study, self.jobs)  # `study report` shows what there is at any time

    def _record(self, job: Job, status: str, message: str, seconds: float) -> None:
        record(self.study, job.name, status=status, message=message, seconds=round(seconds, 1))
        self.ended[job.name] = {"status": status, "message": message}

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """On SIGINT or SIGTERM, let the running jobs save and stop, and start no more."""

        def stop(number: int, frame: object) -> None:
            if not self._stopped:
                print("stopping: run the same command to go on", file=sys.stderr, flush=True)
            self._stopped = True
            for process in self._processes.values():
                _stop(process)

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _stop(process: subprocess.Popen) -> None:
    if process.poll() is None:  # the number of an ended process may be another's
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Raises DetourError if another process runs this study."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DetourError(f"{folder}: another process runs this study; wait for it, or stop it") from None
        yield


def _last_words(log: Path) -> str:
    text = log.read_bytes()[-4000:].decode("utf-8", "replace").strip()
    lines = [line for line in text.splitlines() if line.startswith("error: ")] or text.splitlines()[-1:]
    return lines[-1][:LAST_WORDS] if lines else ""


def _clock(began: float) -> str:
    return f"{duration(time.monotonic() - began):>9}"
