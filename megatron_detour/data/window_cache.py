"""The tokens of each window of an epoch in a small file beside the corpus, so that the next process need not count.

They are a pure function of what the file's name is the hash of: whoever has counted may write it, and where it is not
there, not whole or cannot be written, whoever needs the counts counts.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np

from megatron_detour.files import write_whole

FORMAT = 2  # of the file, and of the order of documents
MAGIC = b"WINDOWS\0"
CRC = struct.Struct("<I")
WORTH = 64  # windows; fewer are counted as fast as a file is opened


class WindowCache:
    """The files PREFIX.windows-HASH of a corpus, told from others by the SHA-256 of its index."""

    def __init__(self, prefix: str, index_sha256: str) -> None:
        self.prefix, self.index_sha256 = prefix, index_sha256

    def path(self, facts: tuple[int, ...]) -> Path:
        """`facts` are all else that the counts depend on: integers, always as many and in the same order."""
        return Path(f"{self.prefix}.windows-{self._digest(facts).hex()[:16]}")

    def read(self, facts: tuple[int, ...], windows: int) -> np.ndarray | None:
        """The counts, int64 [windows], or None where there is no whole file of them."""
        try:
            content = self.path(facts).read_bytes()
        except OSError:
            return None
        head = MAGIC + self._digest(facts)
        body, crc = content[: -CRC.size], content[-CRC.size :]
        if len(content) != len(head) + 8 * windows + CRC.size or not body.startswith(head):
            return None
        return np.frombuffer(body, "<i8", offset=len(head)) if crc == CRC.pack(zlib.crc32(body)) else None

    def write(self, facts: tuple[int, ...], counts: np.ndarray) -> None:
        """Keeps counts that took a while, if the folder can be written."""
        if len(counts) <= WORTH:
            return
        body = MAGIC + self._digest(facts) + counts.astype("<i8").tobytes()
        with suppress(OSError):
            write_whole(self.path(facts), body + CRC.pack(zlib.crc32(body)))

    def _digest(self, facts: tuple[int, ...]) -> bytes:
        return hashlib.sha256(repr((FORMAT, self.index_sha256, facts)).encode()).digest()
