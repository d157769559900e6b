"""`megatron-detour study`: run arms of pretraining against each other, with criteria that were set beforehand."""

from __future__ import annotations

import argparse
import fcntl
import os
import sys
import time
from functools import partial
from pathlib import Path

from megatron_detour.commands.parser import COUNT
from megatron_detour.errors import EXIT_INTERRUPTED, DetourError
from megatron_detour.study.forecast import describe_cost
from megatron_detour.study.jobs import FAILED, Job, find, forget_failures, jobs_of, record, record_of
from megatron_detour.study.plan import Study, read_study
from megatron_detour.study.records import DONE

LISTS = ("list", "slurm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subcommands = parser.add_subcommands(implied="run")
    for name, what, add in (
        ("run", "run a study, or resume it (the default)", add_run_arguments),
        ("report", "rewrite the page from the results", add_report_arguments),
    ):
        add(subcommands.add_parser(name, help=what, description=what))


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("study", type=Path, metavar="STUDY.yaml", help="the study file")
    add("--plan", action="store_true", help="print what the study takes and could find, and exit")
    add("--parallel", type=COUNT, default=1, metavar="N", help="jobs that run at once (%(default)s)")
    add("--jobs", choices=LISTS, help="write the jobs instead: commands, one per line, or Slurm scripts")
    add("--job", metavar="NAME", help="run a single job")
    add("--retry-failed", action="store_true", help="run failed jobs again")
    add("--amend", metavar="REASON", help="accept a study that differs from its registration; every page shows this")


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the folder of a study, or of its kept results")
    parser.add_argument("--output", type=Path, metavar="DIR", help="directory of the page (FOLDER)")


def run(options: argparse.Namespace) -> int:
    """Return the exit status. Raises DetourError."""
    if options.subcommand == "report":
        return _report(options.folder, options.output)
    study = read_study(options.study)
    jobs = jobs_of(study)
    if options.plan:
        print(describe_cost(study, jobs))
        return 0
    if options.job:
        return _run_job(study, find(jobs, options.job))
    return _run_study(study, jobs, options)


def _run_study(study: Study, jobs: list[Job], options: argparse.Namespace) -> int:
    from megatron_detour.study.registration import register
    from megatron_detour.study.results import collect
    from megatron_detour.study.runner import Runner

    say = partial(print, file=sys.stderr if options.jobs == "list" else sys.stdout, flush=True)
    say(describe_cost(study, jobs))
    registration = register(study, options.amend)
    say(f"registered {registration['registered']}, sha256 {registration['sha256'][:16]}\n")
    if options.jobs:
        from megatron_detour.study.cluster import write_jobs

        print(write_jobs(study, jobs, options.jobs))
        return 0
    if options.retry_failed:
        forget_failures(study, jobs)
    status = Runner(study, jobs, options.parallel).run()
    collect(study, jobs)
    _report(study.folder, None)
    return status


def _run_job(study: Study, job: Job) -> int:
    """Run one job of a study that is as registered, and record how it ended.

    It first waits for a process that a killed session has left running the job.
    """
    from megatron_detour.study.registration import register

    register(study)
    path = study.folder / "locks" / f"{job.name.replace('/', '-')}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        os.set_inheritable(lock.fileno(), True)
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended = record_of(study, job.name)
        if ended and ended["status"] == DONE:
            return 0
        started = time.monotonic()
        try:
            status = job.work()
        except DetourError as fault:
            record(study, job.name, status=FAILED, message=str(fault), seconds=round(time.monotonic() - started, 1))
            raise
        if status != EXIT_INTERRUPTED:
            result, message = (DONE, "") if status == 0 else (FAILED, f"exit status {status}")
            record(study, job.name, status=result, message=message, seconds=round(time.monotonic() - started, 1))
        return status


def _report(folder: Path, output: Path | None) -> int:
    from megatron_detour.study.judge import write_verdicts
    from megatron_detour.study.page import write_page

    write_verdicts(folder)
    page = write_page(folder, output)
    print(f"page     {page}\nresults  {folder / 'results.jsonl'}")
    return 0
