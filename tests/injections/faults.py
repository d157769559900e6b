"""What can happen to a run: each kind waits for its moment, does its harm, and checks how the session ended."""

from __future__ import annotations

import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from megatron_detour.checkpoint import store
from megatron_detour.errors import EXIT_INTERRUPTED
from tests.injections.runs import INTERVAL, PATIENCE, PHASE_ENDS, Session, begin

SECONDS_TO_END = 60  # after a rank has died
CHECKPOINT_FILES = ("model.safetensors", "optimizer.safetensors", "run_state.json", "config.json", store.LISTING)
Start = Callable[..., Session]
Kind = Callable[[Start, random.Random], str]  # returns where it struck


def moment(session: Session, rng: random.Random) -> str:
    """Waits for a moment of a session and names it; a session that ends before has had its moment."""
    here = max(session.step(), 0)
    boundary = next(end for end in PHASE_ENDS if end > here) if here < PHASE_ENDS[-1] else PHASE_ENDS[-1]
    moments: dict[str, Callable[[], bool]] = {
        "start-up": lambda: True,
        "first step": lambda: session.step() >= here,
        "step": lambda: session.step() > here + rng.randrange(1, 5),
        "save": session.saving,
        "boundary": lambda: session.step() >= boundary,
    }
    name = rng.choice(list(moments))
    if name == "start-up":
        time.sleep(rng.uniform(0, 3))
    wait_for(moments[name], session)
    time.sleep(rng.uniform(0, 0.05))
    return name


def wait_for(happened: Callable[[], bool], session: Session) -> None:
    deadline = time.monotonic() + PATIENCE
    while session.alive() and not happened():
        assert time.monotonic() < deadline, session.output()[-3000:]
        time.sleep(0.002)


def sigkill(start: Start, rng: random.Random) -> str:
    """The machine goes: all ranks at once."""
    session = start()
    when = moment(session, rng)
    session.kill()
    session.wait()
    return when


def dead_rank(start: Start, rng: random.Random) -> str:
    """One rank goes, as for want of memory: the others end by themselves."""
    session = start()
    when = moment(session, rng)
    joined = session.joined()
    session.kill([rng.randrange(session.setup.ranks)])
    if not joined:  # before the ranks know each other it is srun or the launcher that ends the others
        session.kill()
        when = "start-up"
    codes = session.wait(SECONDS_TO_END)
    assert EXIT_INTERRUPTED not in codes, (codes, session.output()[-3000:])
    return when


def hung_rank(start: Start, rng: random.Random) -> str:
    """One rank stands still: the others end by themselves."""
    session = start()
    wait_for(session.joined, session)
    time.sleep(rng.uniform(0, 1))
    rank = rng.randrange(session.setup.ranks)
    session.kill([rank], signal.SIGSTOP)
    others = [process for number, process in enumerate(session.processes) if number != rank]
    deadline = time.monotonic() + SECONDS_TO_END
    while any(process.is_alive() for process in others) and time.monotonic() < deadline:
        time.sleep(0.1)
    still = [process.pid for process in others if process.is_alive()]
    session.kill()  # what the launcher or Slurm does with the one that hangs
    session.wait()
    assert not still, session.output()[-3000:]
    return "step"


def failed_rank(start: Start, rng: random.Random) -> str:
    """One rank raises: its traceback is the first that is told, and the others end by themselves."""
    session = start(RAISE_AT=str(rng.randrange(1, PHASE_ENDS[-1] + 1)))
    codes = session.wait()
    output = session.output()
    if "injected" in output:
        assert all(code == 1 for code in codes), (codes, output[-3000:])
        assert output.count("Traceback") == 1, output[-3000:]
        assert "error (rank" not in output.partition("Traceback")[0], output[-3000:]
    return "step"


def sigterm(start: Start, rng: random.Random, number: int = signal.SIGTERM) -> str:
    """Preemption: it saves the step it is in, and says that it wants to go on."""
    session = start()
    wait_for(session.joined, session)
    when = moment(session, rng)
    session.kill(None if rng.random() < 0.5 else [rng.randrange(session.setup.ranks)], number)
    codes = session.wait()
    assert set(codes) in ({0}, {EXIT_INTERRUPTED}), (codes, session.output()[-3000:])
    newest = store.latest(session.folder / "checkpoints")
    assert store.step_of(newest) == session.step(), session.output()[-3000:]  # nothing at all is lost
    return when


def sigusr1(start: Start, rng: random.Random) -> str:
    return sigterm(start, rng, signal.SIGUSR1)


def full_disk(start: Start, rng: random.Random) -> str:
    """A file cannot grow beyond some size, as on a full disk: one sentence, status 1, and what was saved stays."""
    session = start()
    wait_for(lambda: session.step() >= 0, session)
    first = session.processes[0]
    if first.is_alive():
        limit = rng.choice([8_000, 20_000, 200_000])  # less than metrics, weights, moments
        try:
            resource.prlimit(first.pid, resource.RLIMIT_FSIZE, (limit, limit))
        except OSError:  # it has ended meanwhile
            session.wait()
            return "too late"
    codes = session.wait()
    if set(codes) != {0}:
        assert set(codes) == {1}, (codes, session.output()[-3000:])
        assert "Traceback" not in session.output(), session.output()[-3000:]
        assert "error: " in session.output(), session.output()[-3000:]
    return "write"


def damage(start: Start, rng: random.Random) -> str:
    """A killed run's newest checkpoint or metrics are damaged: the one before is taken, where it has to be."""
    session = start()
    wait_for(lambda: session.step() > INTERVAL, session)
    session.kill()
    session.wait()
    newest = store.latest(session.folder / "checkpoints")
    trained = [folder for folder in store.find_checkpoints(session.folder / "checkpoints") if store.step_of(folder)]
    if len(trained) < 2 or store.step_of(newest) == PHASE_ENDS[-1]:  # a run that has lost all is refused
        return "nothing to damage"
    harms = ["flip", "truncate", "empty", "delete", "stray", "double"]
    if session.step() > store.step_of(newest):  # what comes before a checkpoint is on the disk before it
        harms.append("metrics")
    how = rng.choice(harms)
    victim = newest / rng.choice(CHECKPOINT_FILES)
    content = bytearray(victim.read_bytes())
    if how == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        victim.write_bytes(content)
    elif how == "truncate":
        victim.write_bytes(content[: rng.randrange(len(content))])
    elif how == "empty":
        shutil.rmtree(newest)
        newest.mkdir()
    elif how == "delete":
        victim.unlink()
    elif how == "stray":  # no damage: nothing is lost by it
        (newest / "README.md").write_text("of somebody")
        (newest / "notes").mkdir(exist_ok=True)
        assert store.latest(session.folder / "checkpoints") == newest
    elif how == "double":
        metrics = session.folder / "metrics.jsonl"
        lines = metrics.read_bytes().splitlines(keepends=True)
        metrics.write_bytes(b"".join([*lines[:-1], *lines[rng.randrange(len(lines)) : -1], lines[-1]]))
    else:
        metrics = session.folder / "metrics.jsonl"
        metrics.write_bytes(metrics.read_bytes()[: -rng.randrange(1, 40)])
    return how


KINDS: dict[str, Kind] = {
    "SIGKILL of all": sigkill,
    "SIGKILL of one rank": dead_rank,
    "rank that hangs": hung_rank,
    "rank that raises": failed_rank,
    "SIGTERM": sigterm,
    "SIGUSR1": sigusr1,
    "full disk": full_disk,
    "damaged file": damage,
}
OF_SEVERAL_RANKS = ("SIGKILL of one rank", "rank that hangs")


def starter(folder: Path, run_file: Path, setup, log: Path) -> Start:
    return lambda **more: begin(folder, run_file, setup, log, **more)
