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
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

from megatron_detour.errors import DetourError
from megatron_detour.training.cluster import PORTS

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


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
    in_vain = []

    def forward(number: int, frame: FrameType | None) -> None:
        ranks = _ranks_that_listen(process.pid)
        for rank in ranks:
            rank.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)
        if not ranks:  # nothing has begun, and nothing is lost
            in_vain.append(number)
            os.killpg(process.pid, signal.SIGKILL)

    for number in FORWARDED:
        signal.signal(number, forward)
    status = process.wait()
    if in_vain:
        print("stopped before the run began", file=sys.stderr)
        return 130
    return status if status >= 0 else 128 - status


def _ranks_that_listen(launcher: int) -> list[psutil.Process]:
    """Those that take signals already (training/stop.py): others would die of them."""
    found = []
    for process in psutil.Process(launcher).children(recursive=True):
        with suppress(psutil.Error, OSError):  # one that has just ended
            caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text(), re.M)
            if "RANK" in process.environ() and int(caught[1], 16) >> (signal.SIGUSR1 - 1) & 1:
                found.append(process)
    return found
