"""Start DeepSpeed's launcher for the example scripts. Signals reach only the ranks, so that Ctrl-C saves a checkpoint
instead of printing a launcher's traceback, and the prompt returns once all processes have exited."""

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
POLL_SECONDS = 0.3  # until the first rank handles signals


def launch(script: str, arguments: list[str]) -> int:
    """Run `script` on RANKS ranks (default: one per GPU) under DeepSpeed's launcher; return the ranks' exit status.

    Raises DetourError if DeepSpeed is not installed.
    """
    deepspeed = shutil.which("deepspeed")
    if deepspeed is None:
        raise DetourError("deepspeed is not installed; run make install")
    port = os.environ.get("MASTER_PORT") or str(random.choice(PORTS))
    ranks = ["--num_gpus", os.environ["RANKS"]] if os.environ.get("RANKS") else []
    if not (shutil.which("nvidia-smi") or Path("/dev/kfd").exists()):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # avoids a warning
    command = [deepspeed, "--log_level", "critical", "--master_port", port, *ranks, script, *arguments]
    process = subprocess.Popen(command, start_new_session=True)  # out of reach of a terminal's Ctrl-C
    began = aborted = False  # a rank handles signals; a signal came before that

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal began, aborted
        ranks = _ranks_handling_signals(process.pid)
        began = began or bool(ranks)
        for rank in ranks:
            with suppress(psutil.Error):
                rank.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)
        if not began:  # no work is lost
            aborted = True
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def suspend(number: int, frame: FrameType | None) -> None:
        """Ctrl-Z and fg reach only this process's group: suspend and resume the launcher's processes with it."""
        children = _process_tree(process.pid)
        for child in children:
            with suppress(psutil.Error):
                child.suspend()
        os.kill(os.getpid(), signal.SIGSTOP)
        for child in children:
            with suppress(psutil.Error):
                child.resume()

    for number in FORWARDED:
        signal.signal(number, forward)
    signal.signal(signal.SIGTSTP, suspend)
    while not began and process.poll() is None:
        time.sleep(POLL_SECONDS)
        began = began or bool(_ranks_handling_signals(process.pid))
    status = process.wait()
    if aborted:
        print("stopped before the run began", file=sys.stderr)
        return 130
    return status if status >= 0 else 128 - status


def _ranks_handling_signals(launcher: int) -> list[psutil.Process]:
    """Return the ranks that have installed handlers (runtime/preemption.py): a signal would kill any other."""
    ranks = []
    for process in _process_tree(launcher):
        with suppress(psutil.Error, OSError):  # it has just exited
            caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text(), re.M)
            if "RANK" in process.environ() and int(caught[1], 16) >> (signal.SIGUSR1 - 1) & 1:
                ranks.append(process)
    return ranks


def _process_tree(launcher: int) -> list[psutil.Process]:
    """Return the launcher and its descendants; none once it has exited."""
    try:
        process = psutil.Process(launcher)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []
