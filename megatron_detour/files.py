"""Files that are there whole or as they were before, what identifies them, and disks that are away for a moment."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
PAUSES = (1.0, 4.0, 15.0)  # seconds before an operation is tried again
TRANSIENT = {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOLINK}
ABANDONED_SECONDS = 24 * 3600  # without a change: of a writer on another machine, whose life is not seen from here


def is_transient(error: BaseException | None) -> bool:
    """Whether an error may pass by itself, as when a file server is away for a moment."""
    return isinstance(error, OSError) and error.errno in TRANSIENT


def retry(work: Callable[[], T]) -> T:
    """What `work` returns, which can be done again from its beginning; it is, a few times, after a passing error."""
    for pause in PAUSES:
        try:
            return work()
        except OSError as error:
            if not is_transient(error):
                raise
            time.sleep(pause)
    return work()


def write_whole(path: Path, content: str | bytes | Iterator[bytes]) -> None:
    """Writes a file beside `path`, brings it to the disk and gives it its name in one move."""
    aside = path.with_name(f".{path.name}.part")
    whole = content.encode() if isinstance(content, str) else content

    def write() -> None:
        with aside.open("wb") as file:
            file.writelines([whole] if isinstance(whole, bytes) else whole)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)

    try:
        retry(write) if isinstance(whole, bytes) else write()  # parts are made once
    except Exception as error:
        if isinstance(error, OSError):  # a write to a full disk does not say which file
            error.filename = error.filename or str(path)
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def aside_of(path: Path, purpose: str) -> Path:
    """Where this process writes what is to be called `path`, or moves what was."""
    return path.with_name(f".{path.name}.{purpose}-{socket.gethostname()}-{os.getpid()}")


def remove_abandoned(path: Path) -> None:
    """Removes what killed writers of `path` have left aside: those of this machine, and of any other after a day."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        match = re.fullmatch(r"(?:writing|replaced)-(?:(.+)-)?(\d+)", left.name.removeprefix(f".{path.name}."))
        if match is None:
            continue
        dead = match[1] == socket.gethostname() and not _is_alive(int(match[2]))
        with suppress(OSError):
            if dead or time.time() - left.lstat().st_mtime > ABANDONED_SECONDS:
                discard(left)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # somebody else's
        return True
    return True


def discard(path: Path, silent: bool = True) -> None:
    """Removes a folder, a file or a link, and nothing that a link points to; `silent`: as far as it can be removed."""
    with suppress(OSError) if silent else nullcontext():
        if path.is_symlink() or path.is_file():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path, ignore_errors=silent)


def flush(path: Path) -> None:
    """Brings a file or a folder's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_facts(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
