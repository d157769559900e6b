"""Cache of the tokens per window of an epoch: a small file beside the corpus, so that other processes need not count.

The counts are a pure function of the key that is hashed into the file's name: any process may write the file, and if it
is missing, damaged or cannot be written, the counts are computed.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np

from megatron_detour.files import write_whole

CACHE_FORMAT = 2  # of the file and of the order of documents
MAGIC = b"WINDOWS\0"
CRC = struct.Struct("<I")
MIN_WINDOWS = 64  # counting fewer is as fast as opening a file


class WindowCache:
    """The files PREFIX.windows-HASH of a corpus that is identified by the SHA-256 of its index."""

    def __init__(self, prefix: str, index_sha256: str) -> None:
        self.prefix, self.index_sha256 = prefix, index_sha256

    def path(self, key: tuple[int, ...]) -> Path:
        """`key` holds everything else that the counts depend on: a fixed number of integers."""
        return Path(f"{self.prefix}.windows-{self._digest(key).hex()[:16]}")

    def read(self, key: tuple[int, ...], windows: int) -> np.ndarray | None:
        """Return the counts, int64 [windows], or None if there is no valid file."""
        try:
            content = self.path(key).read_bytes()
        except OSError:
            return None
        head = MAGIC + self._digest(key)
        body, crc = content[: -CRC.size], content[-CRC.size :]
        if len(content) != len(head) + 8 * windows + CRC.size or not body.startswith(head):
            return None
        return np.frombuffer(body, "<i8", offset=len(head)) if crc == CRC.pack(zlib.crc32(body)) else None

    def write(self, key: tuple[int, ...], counts: np.ndarray) -> None:
        """Store counts of more than MIN_WINDOWS windows, if the folder is writable."""
        if len(counts) <= MIN_WINDOWS:
            return
        body = MAGIC + self._digest(key) + counts.astype("<i8").tobytes()
        with suppress(OSError):
            write_whole(self.path(key), body + CRC.pack(zlib.crc32(body)))

    def _digest(self, key: tuple[int, ...]) -> bytes:
        return hashlib.sha256(repr((CACHE_FORMAT, self.index_sha256, key)).encode()).digest()
