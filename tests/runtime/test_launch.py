"""Signals to what bash examples/... becomes: a command in front of a launcher, for which another one stands in here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_detour.runtime.launch import _process_tree, _ranks_handling_signals
from tests.harness import environment
from tests.runtime.test_failure_detector import PATIENCE

COMMAND = """
import sys
from pathlib import Path
from megatron_detour.runtime import launch
look = launch._ranks_handling_signals
def looked(launcher):
    found = look(launcher)
    if found:
        Path("seen").touch()
    return found
launch._ranks_handling_signals = looked
sys.exit(launch.launch("no script", []))
"""
LAUNCHER = f"""#!{sys.executable}
import os, subprocess, sys, time
from pathlib import Path
while not Path("begin").exists():
    time.sleep(0.02)
rank = subprocess.Popen([sys.executable, "rank.py"], env=os.environ | {{"RANK": "0"}})
Path("launcher.pid").write_text(str(os.getpid()))
status = rank.wait()
Path("over").touch()
while not Path("end").exists():
    time.sleep(0.02)
sys.exit(status)
"""
RANK = """
import os, signal, time
from pathlib import Path
asked = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda number, frame: asked.append(number))
Path("rank.pid").write_text(str(os.getpid()))
while not asked and not Path("done").exists():
    time.sleep(0.02)
raise SystemExit(75 if asked else 0)
"""


@pytest.fixture
def command(tmp_path) -> Iterator[subprocess.Popen]:
    for name, text in (("deepspeed", LAUNCHER), ("rank.py", RANK)):
        (tmp_path / name).write_text(text)
    (tmp_path / "deepspeed").chmod(0o755)
    own = environment() | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    own = {key: value for key, value in own.items() if key != "RANK"}
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND], cwd=tmp_path, env=own, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        for name in ("begin", "done", "end"):  # whatever is left ends
            (tmp_path / name).touch()
        for left in _process_tree(process.pid) if process.poll() is None else []:
            left.kill()
        process.communicate()


def until(condition) -> None:
    ends = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.02)


def wait_for(path: Path) -> None:
    until(path.exists)


@pytest.mark.parametrize(("how", "status"), [("done", 0), (signal.SIGUSR1, 75)])
def test_a_signal_after_the_ranks_have_ended_changes_nothing(command, tmp_path, how, status):
    (tmp_path / "begin").touch()
    wait_for(tmp_path / "seen")
    (tmp_path / "done").touch() if how == "done" else command.send_signal(how)
    wait_for(tmp_path / "over")
    for number in (signal.SIGINT, signal.SIGTERM):
        command.send_signal(number)
    (tmp_path / "end").touch()
    assert command.communicate(timeout=PATIENCE)[1] == ""
    assert command.returncode == status


def test_a_signal_before_there_are_ranks_ends_all(command, tmp_path):
    until(lambda: psutil.Process(command.pid).children())
    until(lambda: catches(command.pid, signal.SIGTSTP))
    command.send_signal(signal.SIGINT)
    assert command.communicate(timeout=PATIENCE)[1] == "stopped before the run began\n"
    assert command.returncode == 130


def test_ctrl_z_stops_the_ranks_as_well_and_fg_wakes_them(command, tmp_path):
    (tmp_path / "begin").touch()
    wait_for(tmp_path / "seen")
    everyone = [psutil.Process(command.pid), *psutil.Process(command.pid).children(recursive=True)]
    assert len(everyone) == 3
    command.send_signal(signal.SIGTSTP)
    until(lambda: all(process.status() == psutil.STATUS_STOPPED for process in everyone))
    command.send_signal(signal.SIGCONT)
    until(lambda: all(process.status() != psutil.STATUS_STOPPED for process in everyone))
    (tmp_path / "end").touch()
    command.send_signal(signal.SIGTERM)
    assert command.wait(PATIENCE) == 75


def test_a_launcher_that_has_ended_has_no_ranks():
    process = subprocess.Popen(["true"])
    process.wait()
    assert _ranks_handling_signals(process.pid) == []


def catches(pid: int, number: int) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(line.split()[1] for line in lines if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)
