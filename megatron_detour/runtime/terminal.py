"""Ctrl-C in a terminal reaches every process of the foreground group, including launchers, which then print tracebacks
and exit before the ranks have saved. So rank 0 makes its own process group the foreground group while it trains: only
rank 0 gets Ctrl-C, informs the other ranks, and the launchers wait for them as usual."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType


@contextmanager
def ctrl_c_for_this_rank() -> Iterator[None]:
    """No-op without a terminal, or in the background."""
    try:
        terminal = os.open("/dev/tty", os.O_RDWR)
    except OSError:
        yield
        return
    launchers = os.getpgrp()
    if os.tcgetpgrp(terminal) != launchers or os.getsid(0) == os.getpid():
        yield
        return

    def suspend(number: int, frame: FrameType | None) -> None:
        """Ctrl-Z stops the launchers' group, which the shell waits for; this rank waits until it resumes."""
        _pass_on(terminal, os.getpgrp(), launchers)
        with suppress(OSError):  # they have exited
            os.killpg(launchers, signal.SIGTSTP)
        time.sleep(0.5)
        while _is_stopped(os.getppid()):
            time.sleep(0.2)
        _pass_on(terminal, launchers, os.getpgrp())

    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # sent to a background process that takes the terminal
    signal.signal(signal.SIGTSTP, suspend)
    os.setpgid(0, 0)
    _pass_on(terminal, launchers, os.getpgrp())
    try:
        yield
    finally:
        _pass_on(terminal, os.getpgrp(), launchers)


def _pass_on(terminal: int, before: int, after: int) -> None:
    """Make `after` the foreground group if `before` is. A terminal that was closed is no error."""
    with suppress(OSError):
        if os.tcgetpgrp(terminal) == before:
            os.tcsetpgrp(terminal, after)


def _is_stopped(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False
