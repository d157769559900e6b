"""The one kind of error that a user can mend: a sentence, no traceback, a non-zero exit."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable

SECONDS_OF_GRACE = 10  # a launcher ends the other ranks well before
_OF_THE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO}


class DetourError(Exception):
    """A fault of input, files or machine. The message is one sentence that names the place and the remedy."""


def nearest(word: str, known: list[str]) -> str:
    """Returns ``" (did you mean 'x'?)"`` for the known word closest to `word`, or an empty string."""
    import difflib

    match = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""


def command_line(main: Callable[[], int | None]) -> None:
    """Runs `main` and exits with its status; a DetourError becomes one sentence on stderr and exit status 1.

    Under a launcher every rank usually meets the same fault: the first one speaks, the others wait until the launcher
    has ended them, and speak only if the fault was theirs alone.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        status = main() or 0
    except DetourError as error:
        status = _tell(str(error), rank)
    except BrokenPipeError:  # whoever read our output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except OSError as error:
        if error.errno not in _OF_THE_MACHINE:
            raise
        status = _tell(f"{error.filename or 'a file'}: {error.strerror}", rank)
    except KeyboardInterrupt as interrupt:
        if str(interrupt) and not rank:
            print(interrupt, file=sys.stderr, flush=True)
        status = 130
    if "RANK" in os.environ:
        # A gloo thread that lets go of its last tensor while the interpreter ends aborts the process (seen with torch
        # 2.13), and NCCL may wait for ranks that are gone: a rank that has done its work leaves at once.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _tell(sentence: str, rank: int) -> int:
    if rank:
        time.sleep(SECONDS_OF_GRACE)
    print(f"error: {sentence}" if not rank else f"error (rank {rank}): {sentence}", file=sys.stderr, flush=True)
    return 1
