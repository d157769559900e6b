"""Send the package's log records to the terminal, above the progress display if there is one.

Modules log to `logging.getLogger(__name__)`. Nothing is shown until a command calls `to_terminal`, on the first rank.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_detour.text import visible


class _Terminal(logging.Handler):
    """Passes each record to `show` as text, with a prefix for warnings."""

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
    """Print the package's log records to stdout from now on."""
    logger = logging.getLogger("megatron_detour")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(_TERMINAL)


@contextmanager
def shown_by(show: Callable[[str], None]) -> Iterator[None]:
    """Print log records with `show` inside the context."""
    before, _TERMINAL.show = _TERMINAL.show, show
    try:
        yield
    finally:
        _TERMINAL.show = before
