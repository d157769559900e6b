"""Where the package's log records go: to the terminal, above the progress display while there is one.

Modules log to `logging.getLogger(__name__)`. Nothing is shown until a command asks for it, on the first rank only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_detour.text import visible


class _Terminal(logging.Handler):
    """Hands each record to `show` as one text, warnings with that word in front."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.show: Callable[[str], None] = _print

    def emit(self, record: logging.LogRecord) -> None:
        level = "warning: " if record.levelno >= logging.WARNING else ""
        self.show(visible(f"{level}{record.getMessage()}"))


def _print(text: str) -> None:
    print(text, flush=True)


_TERMINAL = _Terminal()


def to_terminal() -> None:
    """Prints what the package logs from now on, on stdout."""
    logger = logging.getLogger("megatron_detour")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(_TERMINAL)


@contextmanager
def shown_by(show: Callable[[str], None]) -> Iterator[None]:
    """While it is open, `show` prints the log."""
    before, _TERMINAL.show = _TERMINAL.show, show
    try:
        yield
    finally:
        _TERMINAL.show = before
