"""One run writes a folder: on this machine by flock, elsewhere by a heartbeat that is seen to move."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_detour.errors import DetourError
from megatron_detour.runtime import lock as module
from megatron_detour.runtime.lock import LOCK, RunLock
from tests.harness import ROOT, environment

BEAT, STALE = 0.1, 1.0
HOLDER = """
import sys, time
from pathlib import Path
from megatron_detour.errors import command_line
from megatron_detour.runtime.lock import RunLock
def main():
    with RunLock(Path(sys.argv[1]), 0.1, 1.0):
        print("held", flush=True)
        sys.stdin.readline()
command_line(main)
"""


def lock(folder: Path) -> RunLock:
    return RunLock(folder, BEAT, STALE)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path until a line comes on its stdin."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=environment(), cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


class Elsewhere:
    """A run on another machine that shares the disk but no flock: all that is seen of it is the file it renews."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        content = {"host": "node7", "pid": 42, "started": "2026-01-01", "machine": "another", "token": "theirs"}
        self.path.write_text(json.dumps(content))
        os.utime(self.path, (1.0, 1.0))  # its clock is decades off
        self.killed = threading.Event()
        self.thread = threading.Thread(target=self.beat)
        self.thread.start()

    def beat(self) -> None:
        number = 1
        while not self.killed.wait(BEAT):
            number += 1
            os.utime(self.path, (number, number))

    def kill(self) -> None:
        self.killed.set()
        self.thread.join()


@pytest.fixture
def elsewhere(tmp_path):
    there = Elsewhere(tmp_path)
    yield there
    there.kill()


@pytest.fixture
def without_flock(monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_the_lock_is_gone_after_the_run(tmp_path):
    with lock(tmp_path):
        content = json.loads((tmp_path / LOCK).read_text())
        assert content["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_on_the_machine_is_refused_at_once(tmp_path, holder, caplog):
    caplog.set_level(logging.INFO)
    with pytest.raises(DetourError) as refused, lock(tmp_path):
        pass
    content = json.loads((tmp_path / LOCK).read_text())
    assert str(refused.value) == (
        f"{tmp_path}: in use by another run (process {holder.pid} on host {content['host']}, "
        f"since {content['started']}); stop it or set another folder=..."
    )
    assert caplog.messages == []
    holder.communicate("\n")
    assert holder.returncode == 0


def test_a_killed_run_leaves_nothing_to_remove(tmp_path, holder, caplog):
    caplog.set_level(logging.INFO)
    holder.kill()
    holder.wait()
    with lock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert caplog.messages == []  # nor anything to wait for


def test_a_stopped_run_still_holds_its_lock(tmp_path, holder):
    holder.send_signal(signal.SIGSTOP)
    with pytest.raises(DetourError, match="another run"), lock(tmp_path):
        pass


@pytest.mark.parametrize("flock", [True, False])
def test_a_run_elsewhere_is_waited_for_and_succeeded(tmp_path, elsewhere, request, flock, caplog):
    caplog.set_level(logging.INFO)
    if not flock:
        request.getfixturevalue("without_flock")
    threading.Timer(3 * BEAT, elsewhere.kill).start()
    with lock(tmp_path):
        assert elsewhere.killed.is_set()
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    (sentence,) = caplog.messages
    assert "process 42 on host node7" in sentence


def test_a_run_elsewhere_that_goes_on_is_respected(tmp_path, elsewhere, caplog):
    caplog.set_level(logging.INFO)
    with pytest.raises(DetourError, match="process 42 on host node7, since 2026-01-01"), lock(tmp_path):
        pass
    assert len(caplog.messages) == 1
    assert json.loads((tmp_path / LOCK).read_text())["token"] == "theirs"


def test_a_lock_that_a_server_keeps_for_a_dead_machine_is_taken_over(tmp_path, elsewhere):
    """The flock is seen as held, as NFS keeps one until a lost client's lease ends."""
    with elsewhere.path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        elsewhere.kill()
        with lock(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_a_lock_that_was_renewed_meanwhile_is_not_taken_over(tmp_path, elsewhere):
    """Of several that wait, one has just taken it."""
    elsewhere.kill()
    waiting = lock(tmp_path)
    lock_file = waiting._read_lock()
    os.utime(elsewhere.path)
    assert not waiting._take(lock_file)
    assert json.loads(elsewhere.path.read_text())["token"] == "theirs"
    assert waiting._take(waiting._read_lock())


def test_without_flock_one_of_two_that_start_together_gets_the_folder(tmp_path, without_flock, monkeypatch):
    held, refused = [], []
    over = threading.Event()
    both_have_read, both_have_written = threading.Barrier(2), threading.Barrier(2)
    read, first_reads = module._read, [20, 20]  # seconds that each waits for the other

    def read_together(file):
        content = read(file)
        if first_reads:
            both_have_read.wait(first_reads.pop())
        return content

    monkeypatch.setattr(os, "fsync", lambda file: both_have_written.wait(20))
    monkeypatch.setattr(module, "_read", read_together)

    def start():
        try:
            with lock(tmp_path):
                held.append(1)
                over.wait(20)
        except DetourError:
            refused.append(1)
            over.set()

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 1)


def test_a_run_whose_lock_was_taken_over_ends(tmp_path, holder):
    path = tmp_path / LOCK
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"host": "node7", "token": "theirs"}))
    assert holder.wait(60) == 1
    errors = holder.stderr.read()
    assert "on host node7" in errors
    assert "taken over by" in errors
    assert json.loads(path.read_text())["token"] == "theirs"


def test_a_lock_that_somebody_removes_is_made_again(tmp_path, holder):
    path = tmp_path / LOCK
    content = path.read_text()
    path.unlink()
    deadline = time.monotonic() + 60
    while not path.exists() or path.read_text() != content:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(DetourError, match="another run"), lock(tmp_path):
        pass
    holder.communicate("\n")
    assert (holder.returncode, list(tmp_path.iterdir())) == (0, [])


def test_a_run_whose_folder_is_removed_lets_its_lock_go(tmp_path):
    (tmp_path / "run").mkdir()
    with lock(tmp_path / "run"):
        shutil.rmtree(tmp_path / "run")
        time.sleep(3 * BEAT)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", "3", '"text"', "[" * 4096, '{"host": 1}'])
def test_a_file_that_is_no_lock_is_overwritten(tmp_path, content):
    (tmp_path / LOCK).write_text(content)
    with lock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
