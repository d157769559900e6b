"""Rank 0 in a terminal's foreground."""

from __future__ import annotations

import errno
import signal
from types import SimpleNamespace

import pytest

from megatron_detour.runtime import terminal as module

LAUNCHERS, OWN = 10, 20


class Terminal:
    """Stands in for the module os, with a terminal that can go away."""

    O_RDWR = 0

    def __init__(self) -> None:
        self.foreground, self.group, self.is_gone = LAUNCHERS, LAUNCHERS, False

    def open(self, path: str, flags: int) -> int:
        return 3

    def tcgetpgrp(self, terminal: int) -> int:
        if self.is_gone:
            raise OSError(errno.EIO, "Input/output error")
        return self.foreground

    def tcsetpgrp(self, terminal: int, group: int) -> None:
        if self.is_gone:
            raise OSError(errno.EIO, "Input/output error")
        self.foreground = group

    def setpgid(self, process: int, group: int) -> None:
        self.group = OWN

    def killpg(self, group: int, number: int) -> None:
        if self.is_gone:
            raise ProcessLookupError(errno.ESRCH, "No such process")

    def getpgrp(self) -> int:
        return self.group

    def getpid(self) -> int:
        return OWN

    def getppid(self) -> int:
        return 0  # no such process

    def getsid(self, process: int) -> int:
        return 1


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
    made, handlers = Terminal(), {}
    monkeypatch.setattr(module, "os", made)
    named = {name: getattr(signal, name) for name in ("SIGTTOU", "SIGTSTP", "SIG_IGN")}
    monkeypatch.setattr(module, "signal", SimpleNamespace(signal=handlers.__setitem__, **named))
    made.handlers = handlers
    return made


def test_the_foreground_is_given_back(terminal):
    with module.ctrl_c_for_this_rank():
        assert terminal.foreground == OWN
        terminal.handlers[signal.SIGTSTP](signal.SIGTSTP, None)
        assert terminal.foreground == OWN
    assert terminal.foreground == LAUNCHERS


def test_a_terminal_that_is_gone_does_not_make_a_failure_of_a_good_end(terminal):
    with module.ctrl_c_for_this_rank():
        terminal.is_gone = True
        terminal.handlers[signal.SIGTSTP](signal.SIGTSTP, None)
