"""Starts DeepSpeed's launcher for an example that bash runs. Signals reach the ranks alone, so that a Ctrl-C is a save
and not a launcher's traceback, and the prompt comes back once all have ended."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

from megatron_detour.errors import DetourError
from megatron_detour.runtime.slurm import PORTS

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
LOOK_SECONDS = 0.3  # between looks for ranks, until there are some


def launch(script: str, arguments: list[str]) -> int:
    """Runs `script` on RANKS ranks (default: one a GPU) under DeepSpeed's launcher; returns the ranks' exit status.

    Raises DetourError where there is no launcher.
    """
    deepspeed = shutil.which("deepspeed")
    if deepspeed is None:
        raise DetourError("deepspeed is not installed; run make install")
    port = os.environ.get("MASTER_PORT") or str(random.choice(PORTS))
    ranks = ["--num_gpus", os.environ["RANKS"]] if os.environ.get("RANKS") else []
    command = [deepspeed, "--log_level", "critical", "--master_port", port, *ranks, script, *arguments]
    process = subprocess.Popen(command, start_new_session=True)  # a terminal's Ctrl-C does not get there
    began = in_vain = False  # ranks have been seen; a signal came before

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal began, in_vain
        ranks = _ranks_that_listen(process.pid)
        began = began or bool(ranks)
        for rank in ranks:
            with suppress(psutil.Error):
                rank.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)
        if not began:  # nothing is lost; once all ranks have ended, the launcher is soon at its end as well
            in_vain = True
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def suspend(number: int, frame: FrameType | None) -> None:
        """Ctrl-Z stops only this process's group, which the shell then waits for; and what fg wakes is this process."""
        others = _below(process.pid)
        for other in others:
            with suppress(psutil.Error):
                other.suspend()
        os.kill(os.getpid(), signal.SIGSTOP)
        for other in others:
            with suppress(psutil.Error):
                other.resume()

    for number in FORWARDED:
        signal.signal(number, forward)
    signal.signal(signal.SIGTSTP, suspend)
    while not began and process.poll() is None:
        time.sleep(LOOK_SECONDS)
        began = began or bool(_ranks_that_listen(process.pid))
    status = process.wait()
    if in_vain:
        print("stopped before the run began", file=sys.stderr)
        return 130
    return status if status >= 0 else 128 - status


def _ranks_that_listen(launcher: int) -> list[psutil.Process]:
    """Those that take signals already (runtime/preemption.py): others would die of them."""
    found = []
    for process in _below(launcher):
        with suppress(psutil.Error, OSError):  # one that has just ended
            caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text(), re.M)
            if "RANK" in process.environ() and int(caught[1], 16) >> (signal.SIGUSR1 - 1) & 1:
                found.append(process)
    return found


def _below(launcher: int) -> list[psutil.Process]:
    """The launcher and all that it has started; none once it has ended."""
    try:
        process = psutil.Process(launcher)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []
