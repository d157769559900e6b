"""Atomic file writes, file checksums, and retries when a disk is briefly unavailable."""

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
PAUSES = (1.0, 4.0, 15.0)  # seconds before an operation is retried
TRANSIENT = {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOLINK}
ABANDONED_SECONDS = 24 * 3600  # without a change; whether a writer on another machine is alive cannot be seen here


def is_transient(error: BaseException | None) -> bool:
    """Return whether an error may resolve itself, as when a file server is briefly unavailable."""
    return isinstance(error, OSError) and error.errno in TRANSIENT


def retry(work: Callable[[], T]) -> T:
    """Return what `work` returns. It is repeated from its beginning, a few times, after a transient error."""
    for pause in PAUSES:
        try:
            return work()
        except OSError as error:
            if not is_transient(error):
                raise
            time.sleep(pause)
    return work()


def write_whole(path: Path, content: str | bytes | Iterator[bytes]) -> None:
    """Write a file atomically: to a temporary file beside `path` that is synced to disk and renamed."""
    aside = path.with_name(f".{path.name}.part")
    whole = content.encode() if isinstance(content, str) else content

    def write() -> None:
        with aside.open("wb") as file:
            file.writelines([whole] if isinstance(whole, bytes) else whole)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)

    try:
        retry(write) if isinstance(whole, bytes) else write()  # an iterator cannot be repeated
    except Exception as error:
        if isinstance(error, OSError):  # the error of a full disk does not name the file
            error.filename = error.filename or str(path)
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def aside_of(path: Path, purpose: str) -> Path:
    """Return where this process writes what will become `path`, or moves what it replaces."""
    return path.with_name(f".{path.name}.{purpose}-{socket.gethostname()}-{os.getpid()}")


def remove_abandoned(path: Path) -> None:
    """Remove leftovers of killed writers of `path`: those of this machine, and those of others after a day."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*"):
        match = re.fullmatch(r"(?:writing|replaced)-(?:(.+)-)?(\d+)", leftover.name.removeprefix(f".{path.name}."))
        if match is None:
            continue
        dead = match[1] == socket.gethostname() and not _is_alive(int(match[2]))
        with suppress(OSError):
            if dead or time.time() - leftover.lstat().st_mtime > ABANDONED_SECONDS:
                discard(leftover)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's process
        return True
    return True


def discard(path: Path, silent: bool = True) -> None:
    """Remove a folder, a file or a link (not its target); `silent` ignores what cannot be removed."""
    with suppress(OSError) if silent else nullcontext():
        if path.is_symlink() or path.is_file():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path, ignore_errors=silent)


def flush(path: Path) -> None:
    """Sync a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_facts(path: Path) -> dict[str, Any]:
    """Return a file's size in bytes and its SHA-256."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
