"""Only one run at a time writes to a run directory, on one machine or on several that share the disk."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_detour.errors import DetourError, leave, print_error

logger = logging.getLogger(__name__)

LOCK = "run.lock"
KEYS = ("host", "pid", "started", "machine", "token")
BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
_NO_FLOCK = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


@dataclass(frozen=True)
class _Snapshot:
    """State of the lock file when it was read. The file is reopened for each, as NFS shows changes only then."""

    content: dict[str, Any]
    version: tuple[int, int]  # inode and modification time: compared with each other, never with a clock


class RunLock:
    """A context manager that holds `folder/run.lock`. The folder exists; one process per run takes the lock.

    On one machine flock decides; the kernel releases it when its holder exits. Between machines, and on file systems
    without flock, a lock is valid while its holder renews it: one that was not renewed for `stale` seconds is taken
    over, and a run that was suspended so long that its lock was taken over exits. Clocks of different machines are
    never compared.
    """

    def __init__(self, folder: Path, beat: float = BEAT_SECONDS, stale: float = STALE_SECONDS) -> None:
        self._path, self._beat, self._stale = folder / LOCK, beat, stale
        self._holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "machine": _machine(),
            "token": uuid.uuid4().hex,
        }
        self._file = -1
        self._released = threading.Event()
        self._heart = threading.Thread(target=self._keep, name="run lock", daemon=True)

    def __enter__(self) -> RunLock:
        """Wait for a lock that may belong to a dead run. Raises DetourError if another run holds it."""
        began = seen_at = time.monotonic()
        last: _Snapshot | None = None
        while not self._take(last if time.monotonic() - seen_at >= self._stale else None):
            lock, now = self._read_lock(), time.monotonic()
            if lock and self._is_here(lock.content) and self._flocked():
                raise self._refusal(lock.content)
            if lock and last is None:
                holder, seconds = _format_holder(lock.content), 2 * self._stale
                logger.info("%s is held by %s; waiting up to %.0f s for it", self._path, holder, seconds)
            if lock and (last is None or lock.version != last.version):
                last, seen_at = lock, now
            if lock and now - began > 2 * self._stale and now - seen_at < self._stale:
                raise self._refusal(lock.content)
            time.sleep(min(self._beat, self._stale) / 5)
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._released.set()
        self._heart.join()
        if self._is_own():
            self._path.unlink(missing_ok=True)
        os.close(self._file)

    def _take(self, stale: _Snapshot | None) -> bool:
        """Write the lock if it is free, or unchanged since `stale`, which is old enough."""
        file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        flocked, content = _flock(file), _read(file)
        is_stale = stale is not None and _version(file) == stale.version
        # flock is only reliable for processes of this machine.
        free = not content if flocked is None else flocked and (not content or self._is_here(content))
        if is_stale and flocked is False:  # the file server still keeps the flock of a machine that is down
            self._path.unlink(missing_ok=True)
        elif (free or is_stale) and _is_at(file, self._path) and self._write(file, settle=flocked is None):
            self._file = file
            return True
        os.close(file)
        return False

    def _write(self, file: int, settle: bool) -> bool:
        """Write the holder. Without flock two runs may have seen it free: the one that wrote last holds it."""
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(self._holder).encode(), 0)
        os.fsync(file)
        if settle:
            time.sleep(self._beat / 5)
        return not settle or self._is_own()

    def _read_lock(self) -> _Snapshot | None:
        try:
            file = os.open(self._path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            content = _read(file)
            return _Snapshot(content, _version(file)) if content else None
        finally:
            os.close(file)

    def _flocked(self) -> bool:
        """Return whether a live process of this machine holds the flock."""
        file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            return _flock(file) is False
        finally:
            os.close(file)

    def _is_own(self) -> bool:
        lock = self._read_lock()
        return lock is not None and lock.content.get("token") == self._holder["token"]

    def _is_here(self, content: dict[str, Any]) -> bool:
        return content["machine"] == self._holder["machine"]

    def _refusal(self, content: dict[str, Any]) -> DetourError:
        return DetourError(
            f"{self._path.parent}: in use by another run ({_format_holder(content)}); stop it or set another folder=..."
        )

    def _keep(self) -> None:
        while not self._released.wait(self._beat):
            try:
                lock = self._read_lock()
                if lock and lock.content["token"] != self._holder["token"]:
                    holder = _format_holder(lock.content)
                    print_error(f"{self._path}: taken over by {holder} while this run was suspended", 0)
                    leave(1)
                if not self._path.exists():
                    self._recreate()
                os.utime(self._file)
            except OSError:  # the disk is briefly unavailable
                continue

    def _recreate(self) -> None:
        """The file was deleted: without it a second run could start."""
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        _flock(file)
        self._file, removed = file, self._file
        os.close(removed)
        self._write(file, settle=False)


def _flock(file: int) -> bool | None:
    """Return whether the lock was taken; None if the file system does not support flock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_FLOCK:
            return None
        raise
    return True


def _read(file: int) -> dict[str, Any]:
    """Return the content of a lock file, empty if it is empty or incomplete."""
    try:
        content = json.loads(os.pread(file, 4096, 0))
    except (ValueError, RecursionError, IsADirectoryError):
        return {}
    return content if isinstance(content, dict) and content.keys() >= set(KEYS) else {}


def _version(file: int) -> tuple[int, int]:
    status = os.fstat(file)
    return status.st_ino, status.st_mtime_ns


def _is_at(file: int, path: Path) -> bool:
    """Return whether an open file is still at `path`: a lock on a deleted file excludes nobody."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _machine() -> str:
    """Identify the kernel, within which flock works: host names may repeat, and a container has another one."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _format_holder(content: dict[str, Any]) -> str:
    return f"process {content['pid']} on host {content['host']}, since {content['started']}"
