"""The one kind of error that a user can mend, and how a process tells of errors and ends."""

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

SECONDS_OF_GRACE = 10  # a launcher ends the other ranks well before
SECONDS_TO_FLUSH = 5
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: all is saved, start the same command again
# Of files and disks, also where an error does not name the file.
_OF_THE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO}
_OF_THE_MACHINE |= {errno.ESTALE, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.ENOTEMPTY, errno.EBUSY}
_OF_THE_MACHINE |= {errno.EREMOTEIO, errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO}
# What gloo and torch's store say on a rank whose peer has gone (seen with torch 2.13), and NCCL (not seen).
_OF_ANOTHER_RANK = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection was likely closed",
    "ncclRemoteError",
    "remote process exiting",
    "NCCL communicator was aborted",
)


class DetourError(Exception):
    """A fault of input, files or machine. The message is one sentence that names the place and the remedy."""


def format_faults(faults: list[str]) -> str:
    """One fault, or a list of them, as the message of one error."""
    return faults[0] if len(faults) == 1 else f"{len(faults)} faults:\n  - " + "\n  - ".join(faults)


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns ``" (did you mean 'x'?)"`` for the known word closest to `word`, or an empty string.

    Capitals do not count. What was typed itself is never suggested: where it is known, something else is wrong.
    """
    import difflib

    by_lower = {name.lower(): name for name in known}
    if word in by_lower.values():
        return ""
    match = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.5)
    return f" (did you mean {by_lower[match[0]]!r}?)" if match else ""


def brief(error: BaseException) -> str:
    """What a library says, in one line that is not long; the kind of error where it says nothing."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 300 else f"{words[:300]}..."


def of_another_rank(error: BaseException) -> bool:
    """Whether an exception is only the consequence of another rank's end."""
    if type(error).__name__ == "DistNetworkError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OF_ANOTHER_RANK)


def command_line(main: Callable[[], int | None], grace: float = SECONDS_OF_GRACE) -> None:
    """Runs `main` and exits with its status; a DetourError becomes one sentence on stderr and exit status 1.

    Under a launcher every rank usually meets the same fault: the first one speaks, the others wait `grace` seconds, in
    which the launcher ends them, and speak only if the fault was theirs alone. The first is the one that the exception
    says (its attribute `first_to_fail`, see runtime/failure_detector.py), or rank 0. An unexpected exception shows its
    traceback, one that comes of another rank's end a sentence, after the guilty rank's.
    """
    try:
        status = main() or 0
    except DetourError as error:
        status = _tell(error, str(error), grace)
    except BrokenPipeError:  # whoever read our output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except KeyboardInterrupt as interrupt:
        if str(interrupt) and not _rank():
            print(interrupt, file=sys.stderr, flush=True)
        status = 130
    except Exception as error:
        if isinstance(error, OSError) and (error.errno in _OF_THE_MACHINE or error.filename is not None):
            again = getattr(error, "start_again", False)  # a run says so that has saved, see training/recorder.py
            remedy = "; the disk may be back: start the same command again, which goes on from what was saved"
            status = _tell(error, f"{error.filename or 'a file'}: {error.strerror}{remedy if again else ''}", grace)
            status = EXIT_INTERRUPTED if again else status
        elif "RANK" not in os.environ:
            raise
        else:
            status = _tell_unexpected(error, grace)
    if "RANK" in os.environ:
        # A gloo thread that lets go of its last tensor while the interpreter ends aborts the process (seen with torch
        # 2.13), and NCCL may wait for ranks that are gone: a rank that has done its work leaves at once.
        leave(status)
    sys.exit(status)


def leave(status: int) -> NoReturn:
    """Ends the process at once from any thread, with what it has printed."""
    # Whoever holds the lock of a stream, perhaps in front of a full pipe, must not keep the process.
    stuck = threading.Timer(SECONDS_TO_FLUSH, os._exit, [status])
    stuck.daemon = True
    stuck.start()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # nobody reads it any more
            continue
    os._exit(status)


def say_error(sentence: str, rank: int) -> None:
    """Writes the one line of an error, past the streams' locks, as another thread may hold them."""
    said = visible(sentence)  # a name from outside must not steer the terminal
    line = f"error: {said}\n" if not rank else f"error (rank {rank}): {said}\n"
    os.write(2, line.encode("utf-8", "backslashreplace"))  # a file's name may hold bytes that are not UTF-8


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _let_the_first_speak(error: Exception, grace: float) -> None:
    """Waits; a rank that the launcher asked to end before its own fault came leaves (runtime/preemption.py)."""
    if getattr(error, "asked_to_end", False):
        leave(1)
    time.sleep(grace)


def _tell(error: Exception, sentence: str, grace: float) -> int:
    if not getattr(error, "first_to_fail", _rank() == 0 and not of_another_rank(error)):
        _let_the_first_speak(error, grace)
    say_error(sentence, _rank())
    return 1


def _tell_unexpected(error: Exception, grace: float) -> int:
    if of_another_rank(error):
        cause = str(error).partition("\n")[0]
        return _tell(error, f"another rank has ended or cannot be reached ({type(error).__name__}: {cause})", grace)
    if not getattr(error, "first_to_fail", True):
        _let_the_first_speak(error, grace)
    os.write(2, visible("".join(traceback.format_exception(error))).encode())
    return 1
