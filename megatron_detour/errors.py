"""The one kind of error that a user can mend: a sentence, no traceback, a non-zero exit."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


class DetourError(Exception):
    """A fault of input, files or machine. The message is one sentence that names the place and the remedy."""


def nearest(word: str, known: list[str]) -> str:
    """Returns ``" (did you mean 'x'?)"`` for the known word closest to `word`, or an empty string."""
    import difflib

    match = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""


def command_line(main: Callable[[], int | None]) -> None:
    """Runs `main` and exits with its status; a DetourError becomes one sentence on stderr and exit status 1.

    Under a launcher every rank meets the same fault; rank 0 alone speaks.
    """
    try:
        status = main()
    except DetourError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        status = 1
    except KeyboardInterrupt:
        status = 130
    if "RANK" in os.environ:
        # A gloo thread that lets go of its last tensor while the interpreter ends aborts the process (seen with torch
        # 2.13): a rank that has done its work leaves at once.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)
    sys.exit(status or 0)
