"""How a command reports an error and exits."""

from __future__ import annotations

import errno
import os

import pytest

from megatron_detour import files
from megatron_detour.errors import EXIT_INTERRUPTED, DetourError, command_line

OF_FILES = sorted(errno.errorcode.keys() - {errno.EPIPE, errno.ESHUTDOWN})  # those are a reader's that has gone


def ended(error: BaseException, capfd, monkeypatch) -> tuple[int, str]:
    def fail():
        raise error

    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as end:
        command_line(fail, grace=0)
    return end.value.code, capfd.readouterr().err


@pytest.mark.parametrize("number", OF_FILES, ids=errno.errorcode.get)
def test_an_error_of_a_file_is_one_sentence_that_names_it(number, capfd, monkeypatch):
    error = OSError(number, os.strerror(number), "/data/corpus.bin")
    assert ended(error, capfd, monkeypatch) == (1, f"error: /data/corpus.bin: {os.strerror(number)}\n")


def test_a_run_that_has_saved_asks_to_be_started_again_when_a_disk_is_away(capfd, monkeypatch):
    error = OSError(errno.ESTALE, os.strerror(errno.ESTALE), "/data/x")
    error.restart = True
    status, message = ended(error, capfd, monkeypatch)
    assert status == EXIT_INTERRUPTED
    assert message.startswith("error: /data/x: Stale file handle; the disk may be back: run the same command again")
    assert message.count("\n") == 1


def test_a_fault_of_the_code_keeps_its_traceback(capfd, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    for error in (RuntimeError("a bug"), OSError("no number, no file")):
        with pytest.raises(type(error)):
            command_line(lambda error=error: (_ for _ in ()).throw(error), grace=0)
    assert ended(DetourError("a sentence"), capfd, monkeypatch) == (1, "error: a sentence\n")


@pytest.mark.parametrize("number", sorted(files.TRANSIENT), ids=errno.errorcode.get)
def test_a_passing_error_is_waited_for_and_no_other(number, monkeypatch, tmp_path):
    waited: list[float] = []
    monkeypatch.setattr(files.time, "sleep", waited.append)
    failures = [OSError(number, "away")] * len(files.PAUSES)
    honest = os.fsync

    def fsync(file):
        if failures:
            raise failures.pop()
        honest(file)

    monkeypatch.setattr(os, "fsync", fsync)
    files.write_whole(tmp_path / "a", "content")
    assert ((tmp_path / "a").read_text(), tuple(waited)) == ("content", files.PAUSES)
    failures += [OSError(errno.ENOSPC, "full")]
    with pytest.raises(OSError, match="full") as fault:
        files.write_whole(tmp_path / "b", "content")
    assert fault.value.filename == str(tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert tuple(waited) == files.PAUSES
