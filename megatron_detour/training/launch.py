"""Starts DeepSpeed's launcher for an example that bash runs. Signals reach the ranks alone, so that a Ctrl-C is a save
and not a launcher's traceback, and the prompt comes back once all have ended."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
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

    def forward(number: int, frame: FrameType | None) -> None:
        started = _ranks(process.pid)
        for rank in started:
            rank.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)
        if not started:
            os.killpg(process.pid, signal.SIGKILL)  # the launcher alone: nothing has begun

    for number in FORWARDED:
        signal.signal(number, forward)
    status = process.wait()
    if status == -signal.SIGKILL and not _ranks(process.pid):
        print("stopped before the run began", file=sys.stderr)
        return 130
    return status if status >= 0 else 128 - status


def _ranks(launcher: int) -> list[psutil.Process]:
    found = []
    try:
        for process in psutil.Process(launcher).children(recursive=True):
            if "RANK" in process.environ():
                found.append(process)
    except psutil.Error:  # one that has just ended
        pass
    return found
