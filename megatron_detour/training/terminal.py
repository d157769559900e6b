"""Ctrl-C in a terminal reaches every process of the foreground group, launchers too, which then print tracebacks and
end before the ranks have saved. So rank 0 takes a group of its own to the foreground while it trains: a Ctrl-C is its
alone, it tells the other ranks, and the launchers wait for them as at any other end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


@contextmanager
def ctrl_c_for_this_rank() -> Iterator[None]:
    """Does nothing without a terminal, or in the background."""
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
        """Ctrl-Z stops the launchers' group, which the shell waits for; this rank waits until it goes on."""
        os.tcsetpgrp(terminal, launchers)
        os.killpg(launchers, signal.SIGTSTP)
        time.sleep(0.5)
        while _is_stopped(os.getppid()):
            time.sleep(0.2)
        if os.tcgetpgrp(terminal) == launchers:
            os.tcsetpgrp(terminal, os.getpgrp())

    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # which stops whoever takes the terminal from the background
    signal.signal(signal.SIGTSTP, suspend)
    os.setpgid(0, 0)
    os.tcsetpgrp(terminal, os.getpgrp())
    try:
        yield
    finally:
        if os.tcgetpgrp(terminal) == os.getpgrp():
            os.tcsetpgrp(terminal, launchers)


def _is_stopped(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False
