"""One run at a time writes a folder, on one machine or on several that share the disk."""

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

from megatron_detour.errors import DetourError, leave, say_error

logger = logging.getLogger(__name__)

LOCK = "run.lock"
KEYS = ("host", "pid", "started", "machine", "token")
BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
_NO_FLOCK = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


@dataclass(frozen=True)
class _Look:
    """What the lock file showed at one look. Opened anew each time: NFS tells what is new only then."""

    content: dict[str, Any]
    changed: tuple[int, int]  # the file and its time: only compared with each other, never with a clock


class RunLock:
    """A context manager that holds `folder/run.lock`. The folder exists; one process of a run takes the lock.

    On one machine flock decides, and ends with its holder. Beyond it, and where the file system has no flock, a lock is
    honoured while its holder renews it: a lock that stands still for `stale` seconds is taken over, and a run that
    finds its lock taken over, because it was stopped for so long, ends. Clocks of different machines are not compared.
    """

    def __init__(self, folder: Path, beat: float = BEAT_SECONDS, stale: float = STALE_SECONDS) -> None:
        self._path, self._beat, self._stale = folder / LOCK, beat, stale
        self._own = {
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
        """Waits for a lock that may be a dead run's. Raises DetourError where another run holds it."""
        began = seen_at = time.monotonic()
        last: _Look | None = None
        while not self._take(last if time.monotonic() - seen_at >= self._stale else None):
            look, now = self._look(), time.monotonic()
            if look and self._is_here(look.content) and self._flocked():
                raise self._refusal(look.content)
            if look and last is None:
                whose = _spoken(look.content)
                logger.info("%s is of %s; waiting up to %.0f s for it", self._path, whose, 2 * self._stale)
            if look and (last is None or look.changed != last.changed):
                last, seen_at = look, now
            if look and now - began > 2 * self._stale and now - seen_at < self._stale:
                raise self._refusal(look.content)
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

    def _take(self, stale: _Look | None) -> bool:
        """Writes the lock where nobody holds it, or still as `stale`, which has not changed for long enough."""
        file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        flocked, content = _flock(file), _read(file)
        is_stale = stale is not None and _changed(file) == stale.changed
        # What flock says is true of this machine alone.
        free = not content if flocked is None else flocked and (not content or self._is_here(content))
        if is_stale and flocked is False:  # the server still waits for a machine that is gone
            self._path.unlink(missing_ok=True)
        elif (free or is_stale) and _is_at(file, self._path) and self._write(file, settle=flocked is None):
            self._file = file
            return True
        os.close(file)
        return False

    def _write(self, file: int, settle: bool) -> bool:
        """Writes who holds the lock. Without flock two may have found it free: the one that wrote last has it."""
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(self._own).encode(), 0)
        os.fsync(file)
        if settle:
            time.sleep(self._beat / 5)
        return not settle or self._is_own()

    def _look(self) -> _Look | None:
        try:
            file = os.open(self._path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            content = _read(file)
            return _Look(content, _changed(file)) if content else None
        finally:
            os.close(file)

    def _flocked(self) -> bool:
        """Whether a living process of this machine holds the flock."""
        file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            return _flock(file) is False
        finally:
            os.close(file)

    def _is_own(self) -> bool:
        look = self._look()
        return look is not None and look.content.get("token") == self._own["token"]

    def _is_here(self, content: dict[str, Any]) -> bool:
        return content["machine"] == self._own["machine"]

    def _refusal(self, content: dict[str, Any]) -> DetourError:
        return DetourError(
            f"{self._path.parent}: another run ({_spoken(content)}) writes here; end it or choose another folder=..."
        )

    def _keep(self) -> None:
        while not self._released.wait(self._beat):
            try:
                look = self._look()
                if look and look.content["token"] != self._own["token"]:
                    say_error(f"{self._path}: {_spoken(look.content)} has taken over while this run stood still", 0)
                    leave(1)
                if not self._path.exists():
                    self._make_again()
                os.utime(self._file)
            except OSError:  # a disk that is away for a moment
                continue

    def _make_again(self) -> None:
        """Somebody has removed the file: without it a second run would be let in."""
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        _flock(file)
        self._file, removed = file, self._file
        os.close(removed)
        self._write(file, settle=False)


def _flock(file: int) -> bool | None:
    """Whether the lock was taken; None where the file system has none."""
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
    """The content of a lock file, empty where there is none or it is being written."""
    try:
        content = json.loads(os.pread(file, 4096, 0))
    except (ValueError, RecursionError, IsADirectoryError):
        return {}
    return content if isinstance(content, dict) and content.keys() >= set(KEYS) else {}


def _changed(file: int) -> tuple[int, int]:
    facts = os.fstat(file)
    return facts.st_ino, facts.st_mtime_ns


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file still has this name: a lock on one that was removed meanwhile is worth nothing."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _machine() -> str:
    """Tells apart machines of one name, and knows one under the names of its containers: flock holds within it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _spoken(content: dict[str, Any]) -> str:
    return f"process {content['pid']} on host {content['host']}, since {content['started']}"
