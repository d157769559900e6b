"""How a session ends: what it tells, what it notes, and whether it asks to be started again."""

from __future__ import annotations

import errno
import json
import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_detour import files, log
from megatron_detour.config import from_dict
from megatron_detour.errors import EXIT_INTERRUPTED, DetourError
from megatron_detour.parallel.state import ParallelState
from megatron_detour.plan import Plan
from megatron_detour.run_directory import add_session, note
from megatron_detour.runtime.failure_detector import Verdict
from megatron_detour.training import recorder as module
from megatron_detour.training.checkpoints import Background
from megatron_detour.training.recorder import Recorder
from tests.harness import ROOT
from tests.release.made import PHASES, SIZES


@pytest.fixture
def recorder(tmp_path, monkeypatch) -> Recorder:
    """A recorder of a session whose folder is taken, without a model."""
    raw = {
        "name": "tiny",
        "folder": str(tmp_path / "run"),
        "model": {"config": SIZES, "tokenizer": "nowhere"},
        "data": {"corpora": [{"prefix": "nowhere"}], "sequence_length": 64},
        "batch": {"sequences": 8},
        "phases": PHASES,
        "deepspeed": str(ROOT / "ds_configs" / "zero2_bf16.json"),
    }
    config = from_dict(raw)
    run = SimpleNamespace(config=config, plan=Plan.from_config(config), folder=Path(config.folder))
    run.parallel, run.preemption = ParallelState(), SimpleNamespace(reason=lambda: "SIGTERM")
    background = Background()
    checkpoints = SimpleNamespace(
        has_saved=False, wait=background.wait, submit=background.submit, path=lambda step: f"step-{step}"
    )
    made = Recorder(run, checkpoints)
    made._described = True
    monkeypatch.setattr(log, "_TERMINAL", log._Terminal())
    logger = logging.getLogger("megatron_detour")
    monkeypatch.setattr(logger, "handlers", [log._TERMINAL])
    monkeypatch.setattr(logger, "level", logging.INFO)
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
def test_a_session_asks_to_be_started_again_where_the_next_one_gets_further(recorder, error, has_saved, again):
    with pytest.raises(type(error)) as raised, recorder.own_folder():
        add_session(recorder.run.folder, {"step": 0}, {})
        recorder.checkpoints.has_saved = has_saved
        raise error
    assert getattr(raised.value, "restart", False) == again
    assert ended(recorder.run.folder).startswith("error: ") != again


@pytest.mark.parametrize(
    ("again", "at_its_end", "how"),
    [
        (True, False, "disk unavailable: rank 3 on n has"),
        (False, False, "error: rank 3 on n has"),
        (True, True, "75"),
    ],
)
def test_a_session_that_another_rank_ends_notes_how(recorder, again, at_its_end, how):
    recorder.run.folder.mkdir()
    add_session(recorder.run.folder, {"step": 0, "ended": "75"}, {})
    recorder._ended = at_its_end
    recorder.note_end(Verdict(3, "n", "has", transient=again, restart=again))
    assert ended(recorder.run.folder) == how


def test_notes_of_several_threads_are_all_kept(recorder):
    recorder.run.folder.mkdir()
    add_session(recorder.run.folder, {"step": 0}, {})
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: note(recorder.run.folder, **{f"fact {number}": number}), range(64)))
    noted = json.loads((recorder.run.folder / "environment.json").read_text())["sessions"][-1]
    assert noted == {"step": 0} | {f"fact {number}": number for number in range(64)}


def test_a_fault_of_the_writer_does_not_hide_the_first_one(recorder):
    def fail() -> None:
        raise OSError(errno.EIO, "the second")

    with pytest.raises(DetourError, match="the first"), recorder.own_folder():
        add_session(recorder.run.folder, {"step": 0}, {})
        recorder.checkpoints.submit(fail)
        raise DetourError("the first")
    assert ended(recorder.run.folder) == "error: the first"


@pytest.mark.parametrize("finished", [False, True])
def test_a_session_notes_how_it_ended_before_it_waits_for_a_report(recorder, monkeypatch, finished):
    """Also for one that was begun earlier, at the end of a phase: it may be killed while it waits."""
    recorder.run.folder.mkdir()
    add_session(recorder.run.folder, {"step": 0}, {})
    gate, seen = threading.Event(), []
    monkeypatch.setattr(module, "REPORT_SECONDS", 0.1)
    monkeypatch.setattr(module, "next_commands", lambda *arguments: "")
    monkeypatch.setattr(module, "write_report", lambda folder: gate.wait(60))
    recorder.write_report()  # at the end of a phase
    honest = Future.result

    def result(future, timeout=None):
        seen.append((timeout, ended(recorder.run.folder)))
        gate.set()
        return honest(future, 60)

    monkeypatch.setattr(Future, "result", result)
    recorder.finish(finished)
    assert seen == [(None, "finished") if finished else (0.1, "SIGTERM")]


def test_a_session_that_has_to_stop_says_that_it_has_saved_before_its_report(recorder, monkeypatch, capsys):
    recorder.run.folder.mkdir()
    add_session(recorder.run.folder, {"step": 0}, {})
    asked, gate = [], threading.Event()

    def write_report(folder):
        asked.append(capsys.readouterr().out)
        gate.wait(60)
        return folder / "report.html"

    monkeypatch.setattr(module, "write_report", write_report)
    monkeypatch.setattr(module, "REPORT_SECONDS", 0.5)
    recorder.finish(finished=False)
    assert "report   not written" in capsys.readouterr().out  # and not waited for
    assert f"stopped by SIGTERM: saved; run the same command to resume (exit status {EXIT_INTERRUPTED})" in (asked[0])
    assert ended(recorder.run.folder) == "SIGTERM"
    gate.set()
    monkeypatch.setattr(module, "REPORT_SECONDS", 60)
    recorder.finish(finished=False)
    assert f"report   {recorder.run.folder / 'report.html'}" in capsys.readouterr().out
