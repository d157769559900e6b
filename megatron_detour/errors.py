"""The one kind of error that a user can fix, and how a process reports errors and exits."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from typing import NoReturn

from megatron_detour.text import visible

GRACE_SECONDS = 10  # a launcher kills the other ranks well before
FLUSH_SECONDS = 5
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: a checkpoint was saved, run the same command again
# Errors of files and disks, which may lack the file's name.
_FILE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO}
_FILE_ERRORS |= {errno.ESTALE, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.ENOTEMPTY, errno.EBUSY}
_FILE_ERRORS |= {errno.EREMOTEIO, errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO}
# Messages of gloo and torch's store on a rank whose peer is gone (seen with torch 2.13), and of NCCL (not seen).
_LOST_PEER_MESSAGES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection was likely closed",
    "ncclRemoteError",
    "remote process exiting",
    "NCCL communicator was aborted",
)


class DetourError(Exception):
    """An error in input, files or machine. The message is one sentence that names the place and the remedy."""


def format_faults(faults: list[str]) -> str:
    """Format one or several faults as the message of one error."""
    return faults[0] if len(faults) == 1 else f"{len(faults)} faults:\n  - " + "\n  - ".join(faults)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the known word closest to `word`, or an empty string.

    Case is ignored. `word` itself is never suggested: if it is known, something else is wrong.
    """
    import difflib

    by_lower = {name.lower(): name for name in known}
    if word in by_lower.values():
        return ""
    match = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.5)
    return f" (did you mean {by_lower[match[0]]!r}?)" if match else ""


def brief(error: BaseException) -> str:
    """Return a library's message as one line of up to 300 characters, or the type of an error without a message."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 300 else f"{words[:300]}..."


def caused_by_another_rank(error: BaseException) -> bool:
    """Return whether an exception is only the consequence of another rank's exit."""
    if type(error).__name__ == "DistNetworkError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST_PEER_MESSAGES)


def command_line(main: Callable[[], int | None], grace: float = GRACE_SECONDS) -> None:
    """Run `main` and exit with its status; a DetourError becomes one sentence on stderr and exit status 1.

    Under a launcher usually every rank meets the same error: the first one prints it, the others wait `grace` seconds,
    in which the launcher kills them, and print theirs only if they survive. The first is the one whose exception has
    `first_to_fail` set (see runtime/failure_detector.py), or rank 0. An unexpected exception prints its traceback; one
    caused by another rank's exit prints a sentence, after the failed rank's.
    """
    try:
        status = main() or 0
    except DetourError as error:
        status = _report(error, str(error), grace)
    except BrokenPipeError:  # the reader of our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except KeyboardInterrupt as interrupt:
        if str(interrupt) and not _rank():
            print(interrupt, file=sys.stderr, flush=True)
        status = 130
    except Exception as error:
        if isinstance(error, OSError) and (error.errno in _FILE_ERRORS or error.filename is not None):
            restart = getattr(error, "restart", False)  # set by a run that has saved, see training/recorder.py
            remedy = "; the disk may be back: run the same command again to resume from the last checkpoint"
            status = _report(error, f"{error.filename or 'a file'}: {error.strerror}{remedy if restart else ''}", grace)
            status = EXIT_INTERRUPTED if restart else status
        elif "RANK" not in os.environ:
            raise
        else:
            status = _report_unexpected(error, grace)
    if "RANK" in os.environ:
        # A gloo thread that frees its last tensor during interpreter shutdown aborts the process (torch 2.13), and NCCL
        # may wait for ranks that are gone: a rank that has finished exits at once.
        leave(status)
    sys.exit(status)


def leave(status: int) -> NoReturn:
    """Exit at once from any thread, after flushing what was printed."""
    # A thread that holds the lock of a stream, perhaps blocked by a full pipe, must not keep the process alive.
    timer = threading.Timer(FLUSH_SECONDS, os._exit, [status])
    timer.daemon = True
    timer.start()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # closed
            continue
    os._exit(status)


def print_error(sentence: str, rank: int) -> None:
    """Write an error's line to stderr, bypassing the stream's lock, which another thread may hold."""
    message = visible(sentence)  # names from outside must not control the terminal
    line = f"error: {message}\n" if not rank else f"error (rank {rank}): {message}\n"
    os.write(2, line.encode("utf-8", "backslashreplace"))  # a file name may contain bytes that are not UTF-8


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _wait_for_first_report(error: Exception, grace: float) -> None:
    """Wait; a rank that the launcher terminated before it failed exits silently (runtime/preemption.py)."""
    if getattr(error, "was_terminated", False):
        leave(1)
    time.sleep(grace)


def _report(error: Exception, sentence: str, grace: float) -> int:
    if not getattr(error, "first_to_fail", _rank() == 0 and not caused_by_another_rank(error)):
        _wait_for_first_report(error, grace)
    print_error(sentence, _rank())
    return 1


def _report_unexpected(error: Exception, grace: float) -> int:
    if caused_by_another_rank(error):
        cause = str(error).partition("\n")[0]
        return _report(error, f"another rank exited or cannot be reached ({type(error).__name__}: {cause})", grace)
    if not getattr(error, "first_to_fail", True):
        _wait_for_first_report(error, grace)
    os.write(2, visible("".join(traceback.format_exception(error))).encode())
    return 1
