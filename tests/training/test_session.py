"""How a session ends: what it tells, what it notes, and whether it asks to be started again."""

from __future__ import annotations

import errno
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_detour import files
from megatron_detour.checkpoint.saver import Background
from megatron_detour.config import from_dict
from megatron_detour.errors import EXIT_INTERRUPTED, DetourError
from megatron_detour.plan import Plan
from megatron_detour.run_directory import add_session, note
from megatron_detour.runtime.failure_detector import Verdict
from megatron_detour.training import session as module
from megatron_detour.training.session import Session
from tests.harness import ROOT
from tests.release.made import PHASES, SIZES


@pytest.fixture
def session(tmp_path) -> Session:
    """A session whose folder is taken, without a model."""
    raw = {
        "name": "tiny",
        "folder": str(tmp_path / "run"),
        "model": {"config": SIZES, "tokenizer": "nowhere"},
        "data": {"corpora": [{"prefix": "nowhere"}], "sequence_length": 64},
        "batch": {"sequences": 8},
        "phases": PHASES,
        "deepspeed": str(ROOT / "ds_configs" / "zero2_bf16.json"),
    }
    made = object.__new__(Session)
    made.config = from_dict(raw)
    made.plan, made.folder = Plan.of(made.config), Path(made.config.folder)
    made.state = SimpleNamespace(is_first=True)
    made.stop = SimpleNamespace(reason=lambda: "SIGTERM")
    made.writing, made.reports, made.progress = Background(), Background(), None
    made._described, made._ended = True, False
    made.checkpoints = SimpleNamespace(has_saved=False)
    return made


def ended(folder: Path) -> str:
    return json.loads((folder / "environment.json").read_text())["sessions"][-1]["ended"]


@pytest.mark.parametrize(
    ("error", "has_saved", "again"),
    [
        *((OSError(number, "away"), True, True) for number in sorted(files.TRANSIENT)),
        *((OSError(number, "away"), False, False) for number in sorted(files.TRANSIENT)),
        (OSError(errno.ENOSPC, "full"), True, False),
        (OSError(errno.EACCES, "not yours"), True, False),
        (DetourError("a fault"), True, False),
        (RuntimeError("a bug"), True, False),
    ],
    ids=repr,
)
def test_a_session_asks_to_be_started_again_where_the_next_one_gets_further(session, error, has_saved, again):
    with pytest.raises(type(error)) as raised, session.own_folder():
        add_session(session.folder, {"step": 0}, {})
        session.checkpoints.has_saved = has_saved
        raise error
    assert getattr(raised.value, "start_again", False) == again
    assert ended(session.folder).startswith("error: ") != again


@pytest.mark.parametrize(
    ("again", "at_its_end", "how"),
    [
        (True, False, "a disk that was away: rank 3 on n has"),
        (False, False, "error: rank 3 on n has"),
        (True, True, "75"),
    ],
)
def test_a_session_that_another_rank_ends_notes_how(session, again, at_its_end, how):
    session.folder.mkdir()
    add_session(session.folder, {"step": 0, "ended": "75"}, {})
    session._ended = at_its_end
    session.note_end(Verdict(3, "n", "has", passing=again, again=again))
    assert ended(session.folder) == how


def test_notes_of_several_threads_are_all_kept(session):
    session.folder.mkdir()
    add_session(session.folder, {"step": 0}, {})
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: note(session.folder, **{f"fact {number}": number}), range(64)))
    noted = json.loads((session.folder / "environment.json").read_text())["sessions"][-1]
    assert noted == {"step": 0} | {f"fact {number}": number for number in range(64)}


def test_a_fault_of_the_writer_does_not_hide_the_first_one(session):
    def fail() -> None:
        raise OSError(errno.EIO, "the second")

    with pytest.raises(DetourError, match="the first"), session.own_folder():
        add_session(session.folder, {"step": 0}, {})
        session.writing.submit(fail)
        raise DetourError("the first")
    assert ended(session.folder) == "error: the first"


@pytest.mark.parametrize("finished", [False, True])
def test_a_session_notes_how_it_ended_before_it_waits_for_a_report(session, monkeypatch, finished):
    """Also for one that was begun earlier, at the end of a phase: it may be killed while it waits."""
    monkeypatch.setattr(module, "Checkpoints", lambda *arguments: session.checkpoints)
    session.checkpoints = SimpleNamespace(
        restore=lambda: 1, prepare=lambda: None, refuse_full_disk=lambda: None, path=lambda step: f"step-{step}"
    )
    session.start = session.data = None
    session.folder.mkdir()
    add_session(session.folder, {"step": 0}, {})
    for name in ("_describe", "_open_sinks"):
        monkeypatch.setattr(session, name, lambda *arguments: None)
    monkeypatch.setattr(session, "_trainer", lambda *arguments: SimpleNamespace(run=lambda tokens: finished))
    monkeypatch.setattr(module, "REPORT_SECONDS", 0.1)
    found = []

    def wait(seconds=None):
        found.append((seconds, ended(session.folder)))

    monkeypatch.setattr(session.reports, "wait", wait)
    monkeypatch.setattr(module, "write_report", lambda folder: None)
    monkeypatch.setattr(module, "next_commands", lambda *arguments: "")
    assert session.train(None) is finished
    assert found == [(None, "finished") if finished else (0.1, "SIGTERM")]


def test_a_session_that_has_to_stop_says_that_it_has_saved_before_its_report(session, monkeypatch, capsys):
    session.folder.mkdir()
    add_session(session.folder, {"step": 0}, {})
    asked, gate = [], threading.Event()

    def write_report(folder):
        asked.append(capsys.readouterr().out)
        gate.wait(60)
        return folder / "report.html"

    monkeypatch.setattr(module, "write_report", write_report)
    monkeypatch.setattr(module, "REPORT_SECONDS", 0.5)
    session._finish(session.checkpoints, finished=False)
    assert "report   not written" in capsys.readouterr().out  # and not waited for
    assert (
        f"stopped by SIGTERM: saved, and the same command goes on from there (exit status {EXIT_INTERRUPTED})"
        in (asked[0])
    )
    assert ended(session.folder) == "SIGTERM"
    gate.set()
    monkeypatch.setattr(module, "REPORT_SECONDS", 60)
    session._finish(session.checkpoints, finished=False)
    assert f"report   {session.folder / 'report.html'}" in capsys.readouterr().out
