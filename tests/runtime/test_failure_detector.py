"""What ends a run: a rank that fails, dies or hangs ends the others, in one line each; nothing else does."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from megatron_detour.errors import EXIT_INTERRUPTED, DetourError, caused_by_another_rank, command_line
from megatron_detour.runtime.failure_detector import MAX_LINE_BYTES, MAX_STRANGERS, _Line
from megatron_detour.runtime.preemption import Preemption
from tests.harness import ROOT, environment, free_port, slow

pytestmark = pytest.mark.integration

BEAT, LOST, GRACE = 0.3, 12.0, 0.5  # LOST: longer than a busy machine lets a process wait
PATIENCE = 90.0  # seconds, for processes on a machine that is busy
SCRIPT = """
import sys
from tests.runtime.test_failure_detector import on_rank

on_rank(*[word for word in sys.argv[1:] if not word.startswith("--")])
"""


def on_rank(how: str, guilty: str, folder: str) -> None:
    """The process of a rank: `how` names what the guilty one does."""
    command_line(lambda: _work(how, int(guilty), Path(folder)), grace=8.0)


def _work(how: str, guilty: int, folder: Path) -> int:
    import torch
    import torch.distributed as dist

    from megatron_detour.runtime.failure_detector import FailureDetector

    dist.init_process_group("gloo")
    rank, ones = dist.get_rank(), torch.ones(4)
    with Preemption() as stop, FailureDetector(BEAT, LOST, GRACE) as detector:
        detector.has_saved = lambda: "saved" in how
        detector.on_failure = lambda verdict: (folder / f"ended-{rank}").write_text(f"{verdict.restart} {verdict}")
        dist.all_reduce(ones)
        (folder / f"listens-{rank}").write_text(json.dumps(detector.ports))
        (folder / f"started-{rank}").write_text(str(os.getpid()))
        if how == "until asked":
            while stop.reason() is None:
                time.sleep(0.05)
            (folder / f"asked-{rank}").touch()
            return EXIT_INTERRUPTED
        if how == "all fail":
            raise DetourError("the loss is nan")
        if how == "slow":
            time.sleep(1.5 * LOST if rank == guilty else 0)
        elif rank == guilty:
            _do(how)
        dist.all_reduce(ones)  # where the others hang or are reported
        if how == "leaves early":
            time.sleep(0 if rank == guilty else 10 * BEAT)
    return 0


def _do(how: str) -> None:
    if how == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stands still":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how.startswith("loses its disk"):
        raise OSError(errno.EIO, "Input/output error", "/corpora/x.bin")
    if how == "fails":
        raise ValueError("an unexpected end")
    if how == "is refused":
        raise DetourError("no such corpus")
    if how == "is unheard":  # the group breaks though every rank lives
        raise RuntimeError("Connection reset by peer")


class Ranks:
    """Three ranks that start `on_rank` and write to files."""

    def __init__(self, folder: Path, how: str, guilty: int = 1, ranks: int = 3) -> None:
        self.folder, self.ranks = folder, ranks
        shared = environment() | {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        command = [sys.executable, "-c", SCRIPT, how, str(guilty), str(folder)]
        self.processes = []
        for rank in range(ranks):
            with (folder / f"log-{rank}").open("wb") as log:
                own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                self.processes.append(subprocess.Popen(command, env=own, cwd=ROOT, stdout=log, stderr=log))

    def end(self, *but: int) -> list[int]:
        return [process.wait(PATIENCE) for rank, process in enumerate(self.processes) if rank not in but]

    def log(self, rank: int) -> str:
        """What a rank has said, without torch's own remarks on its connections."""
        lines = (self.folder / f"log-{rank}").read_text().splitlines()
        return "\n".join(line for line in lines if not line.startswith("[W"))


@contextmanager
def ranks(*arguments, **options) -> Iterator[Ranks]:
    started = Ranks(*arguments, **options)
    try:
        yield started
    finally:
        for process in started.processes:
            process.kill()
            process.wait()


def line_of(rank: int, guilty: int, how: str) -> str:
    return f"error{f' (rank {rank})' if rank else ''}: rank {guilty} on {socket.gethostname()} {how}"


@pytest.mark.parametrize("guilty", [0, 1])
def test_a_killed_rank_ends_the_others(tmp_path, guilty):
    with ranks(tmp_path, "is killed", guilty) as run:
        assert run.end(guilty) == [1, 1]
        for rank in {0, 1, 2} - {guilty}:
            how = "exited without an error message: killed, out of memory, crashed, or disconnected"
            assert run.log(rank) == line_of(rank, guilty, how)


@pytest.mark.parametrize("guilty", [1, slow(0)])
def test_a_rank_that_stands_still_ends_the_others(tmp_path, guilty):
    with ranks(tmp_path, "stands still", guilty) as run:
        assert run.end(guilty) == [1, 1]
        for rank in {0, 1, 2} - {guilty}:
            how = f"has not responded for {LOST:.0f} s: killed, out of memory, or its machine is down"
            assert run.log(rank) == line_of(rank, guilty, how)


@pytest.mark.parametrize("guilty", [0, slow(1)])
def test_a_failure_is_reported_by_its_rank_and_named_by_the_others(tmp_path, guilty):
    with ranks(tmp_path, "fails", guilty) as run:
        assert run.end() == [1, 1, 1]
        assert run.log(guilty).startswith("Traceback")
        assert run.log(guilty).endswith("\nValueError: an unexpected end")
        for rank in {0, 1, 2} - {guilty}:
            how = "failed, see its message: ValueError: an unexpected end"
            assert run.log(rank) == line_of(rank, guilty, how)


@pytest.mark.parametrize(("guilty", "saved"), [(0, True), (1, True), (1, False)])
def test_a_disk_that_is_away_from_one_rank_ends_all_with_the_status_that_starts_them_again(tmp_path, guilty, saved):
    """Where the run has saved; rank 0 writes down another rank's failure before it ends."""
    with ranks(tmp_path, "loses its disk" + ", having saved" * saved, guilty, ranks=2) as run:
        assert run.end() == [EXIT_INTERRUPTED if saved else 1] * 2
        assert run.log(guilty).endswith("resume from the last checkpoint" if saved else "x.bin: Input/output error")
        how = "failed, see its message: OSError: [Errno 5] Input/output error: '/corpora/x.bin'"
        assert run.log(1 - guilty) == line_of(1 - guilty, guilty, how)
    reported = {path.name: path.read_text() for path in tmp_path.glob("ended-*")}
    assert reported == ({"ended-0": f"{saved} rank 1 on {socket.gethostname()} {how}"} if guilty else {})


def test_a_sentence_of_a_later_rank_is_not_held_back(tmp_path):
    with ranks(tmp_path, "is refused", 2) as run:
        assert run.end() == [1, 1, 1]
        assert run.log(2) == "error (rank 2): no such corpus"
        assert run.log(0) == line_of(0, 2, "failed, see its message: DetourError: no such corpus")


def test_a_fault_of_all_ranks_is_told_as_such(tmp_path):
    with ranks(tmp_path, "all fail") as run:
        assert run.end() == [1, 1, 1]
        for rank in range(3):
            assert run.log(rank) == f"error{f' (rank {rank})' if rank else ''}: the loss is nan"


def test_a_broken_connection_that_no_rank_is_missing_for_is_told_by_who_met_it(tmp_path):
    with ranks(tmp_path, "is unheard", 1) as run:
        assert run.end() == [1, 1, 1]
        cause = "RuntimeError: Connection reset by peer"
        assert run.log(1) == f"error (rank 1): another rank exited or cannot be reached ({cause})"
        for rank in (0, 2):
            assert run.log(rank) == line_of(rank, 1, f"failed, see its message: {cause}")


def test_a_slow_rank_is_waited_for(tmp_path):
    """Longer than a silent process is."""
    with ranks(tmp_path, "slow") as run:
        assert run.end() == [0, 0, 0]
        assert [run.log(rank) for rank in range(3)] == ["", "", ""]


@pytest.mark.parametrize("first", [0, slow(1)])
def test_who_has_finished_is_not_missed(tmp_path, first):
    with ranks(tmp_path, "leaves early", first) as run:
        assert run.end() == [0, 0, 0]
        assert [run.log(rank) for rank in range(3)] == ["", "", ""]


def test_a_job_that_was_stopped_as_a_whole_goes_on(tmp_path):
    with ranks(tmp_path, "until asked") as run:
        wait_for(tmp_path, "started", 3)
        for process in run.processes:
            process.send_signal(signal.SIGSTOP)
        time.sleep(LOST + 1)
        for process in run.processes:
            process.send_signal(signal.SIGCONT)
        time.sleep(4 * BEAT)
        for process in run.processes:
            process.send_signal(signal.SIGUSR1)
        assert run.end() == [EXIT_INTERRUPTED] * 3
        assert [run.log(rank) for rank in range(3)] == ["", "", ""]


VERDICT = b'{"verdict": {"rank": 1, "host": "h", "how": "is said to have failed"}}'
HOSTILE = {
    "nothing": b"",
    "half a line": b"GET / HTTP/1.1",
    "lines": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "deep": b"[" * 7000 + b"\n",
    "a long line": b"[" * 1_000_000,
    "no UTF-8": b"\xff\xfe\x00\n",
    "a rank without the secret": b'{"rank": 1, "host": "h"}\n' + VERDICT + b"\n",
    "a wrong code": b"0" * 64 + b" " + VERDICT + b"\n",
    "an empty code": b" " + VERDICT + b"\n",
    "a deep one with a code": b"0" * 64 + b" " + b"[" * 7000 + b"\n",
}


def test_nothing_that_a_stranger_sends_ends_a_run(tmp_path):
    with ranks(tmp_path, "until asked") as run:
        wait_for(tmp_path, "started", 3)
        ((address, port),) = json.loads((tmp_path / "listens-0").read_text()).items()
        assert address == "127.0.0.1"  # MASTER_ADDR, and no other interface
        open_ones = []
        for content in HOSTILE.values():
            for half in (False, True):
                connection = socket.create_connection((address, port))
                open_ones.append(connection)
                with suppress(OSError):  # it hangs up
                    connection.sendall(content)
                    if half:
                        connection.shutdown(socket.SHUT_WR)
        open_ones += [socket.create_connection((address, port)) for _ in range(3 * MAX_STRANGERS)]
        for connection in open_ones[: 2 * len(HOSTILE)]:  # rank 0 has dealt with it: it hangs up
            connection.settimeout(PATIENCE)
            with suppress(ConnectionResetError):
                assert connection.recv(1) == b""
        assert [process.poll() for process in run.processes] == [None] * 3
        for connection in open_ones:
            connection.close()
        for process in run.processes:
            process.send_signal(signal.SIGUSR1)
        assert run.end() == [EXIT_INTERRUPTED] * 3
        assert [run.log(rank) for rank in range(3)] == ["", "", ""]


@pytest.fixture
def pair() -> Iterator[tuple[_Line, socket.socket]]:
    """A line and the other end's bare socket."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        other = socket.create_connection(server.getsockname())
        line = _Line(server.accept()[0], b"secret")
    yield line, other
    line.socket.close()
    other.close()


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_line_takes_nothing_without_the_secret(pair, kind):
    line, other = pair
    other.sendall(HOSTILE[kind][: MAX_LINE_BYTES // 2] + b"\n")
    assert line.read() is None
    _Line(other, b"another secret").send({"done": True})
    assert line.read() is None


def test_a_line_reads_what_its_own_kind_sends(pair):
    line, other = pair
    mine = _Line(other, b"secret")
    mine.send({"rank": 1})
    mine.send({"done": True})
    found = []
    while len(found) < 2:
        found += line.read()
    assert found == [{"rank": 1}, {"done": True}]
    other.sendall(b"x" * (2 * MAX_LINE_BYTES))
    while (read := line.read()) == []:
        pass
    assert read is None


def wait_for(folder: Path, name: str, ranks: int) -> None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if len(list(folder.glob(f"{name}-*"))) == ranks:
            return
        time.sleep(0.05)
    raise TimeoutError(f"{name}: {sorted(folder.iterdir())}")


@contextmanager
def launched(folder: Path, *command: str) -> Iterator[subprocess.Popen]:
    """A launcher with two ranks; whatever is left of them is ended."""
    script = folder / "train.py"
    script.write_text(SCRIPT)
    own = environment() | {"DS_ACCELERATOR": "cpu"}
    arguments = [*command, str(script), "until asked", "1", str(folder)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(arguments, env=own, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(folder, "started", 2)
        yield process
    finally:
        for pid in [process.pid, *(int(path.read_text()) for path in folder.glob("started-*"))]:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def deepspeed() -> tuple[str, ...]:
    return "deepspeed", "--num_gpus", "2", "--master_port", str(free_port())


def torchrun() -> tuple[str, ...]:
    return "torchrun", "--nproc_per_node", "2", "--master_port", str(free_port())


def everyone_leaves(folder: Path) -> bool:
    wait_for(folder, "asked", 2)
    left = [int(path.read_text()) for path in folder.glob("started-*")]
    until = time.monotonic() + PATIENCE
    while any(map(is_alive, left)) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(map(is_alive, left))


@pytest.mark.parametrize(("launcher", "number"), [(deepspeed, signal.SIGTERM), (torchrun, signal.SIGKILL)])
def test_ranks_without_their_launcher_save_and_end(tmp_path, launcher, number):
    with launched(tmp_path, *launcher()) as process:
        process.send_signal(number)
        assert everyone_leaves(tmp_path)
        assert "the launcher has exited" in (tmp_path / "log").read_text()


def test_a_signal_to_the_group_of_deepspeed_lets_ranks_save(tmp_path):
    """It kills both of DeepSpeed's own processes."""
    with launched(tmp_path, *deepspeed()) as process:
        os.killpg(process.pid, signal.SIGUSR1)
        assert everyone_leaves(tmp_path)


def test_a_rank_that_wants_to_be_started_again_says_so_through_deepspeed(tmp_path):
    with launched(tmp_path, *deepspeed()) as process:
        for path in tmp_path.glob("started-*"):
            os.kill(int(path.read_text()), signal.SIGUSR1)
        assert process.wait(PATIENCE) == EXIT_INTERRUPTED


@pytest.mark.parametrize(
    ("error", "consequence"),
    [
        (RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:46266"), True),
        (RuntimeError("NCCL error: ncclRemoteError: A call failed possibly due to a network error"), True),
        (RuntimeError("CUDA out of memory"), False),
        (ConnectionResetError("Connection reset by peer"), False),  # not torch's
    ],
)
def test_which_errors_come_of_another_rank(error, consequence):
    assert caused_by_another_rank(error) is consequence


def test_an_unexpected_error_without_ranks_is_python_s():
    def fail():
        raise ValueError("unexpected")

    with pytest.raises(ValueError, match="unexpected"):
        command_line(fail)
