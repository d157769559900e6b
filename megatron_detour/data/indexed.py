"""Megatron's indexed dataset: raw token ids in PREFIX.bin, where each document lies in PREFIX.idx (little endian).

offset   field of .idx
0        magic "MMIDIDX\\0\\0", 9 bytes
9        version, u64 = 1
17       code of the ids' type, u8: 8 = uint16, 4 = int32
18       N, u64: sequences (here one a document)
26       D, u64: documents + 1
34       int32[N] lengths in tokens
34+4N    int64[N] byte offsets into .bin
34+12N   int64[D] document boundaries as sequence numbers, from 0 to N
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

import numpy as np

from megatron_detour.errors import DetourError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CODES = {np.dtype(t): code for code, t in TYPES.items()}
CHUNK = 1 << 20  # documents


def token_type(vocabulary_size: int) -> np.dtype:
    """The type that Megatron chooses for the ids of a vocabulary: uint16 below 65,500, else int32."""
    return np.dtype(np.uint16 if vocabulary_size < 65_500 else np.int32)


def bin_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


class IndexedCorpus:
    """A mapped corpus. Opening it costs no reading; `tokens(i)` is a view of document i's ids, never a copy."""

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        index = _mapped(idx_path(prefix), prefix)
        if len(index) < HEADER.size:
            raise DetourError(f"{idx_path(prefix)}: too short for an index; build the corpus again")
        magic, version, code, sequences, boundaries = HEADER.unpack_from(index)
        if magic != MAGIC or version != 1 or code not in TYPES:
            raise DetourError(f"{idx_path(prefix)}: not an index of Megatron's format, version 1")
        expected = HEADER.size + 12 * sequences + 8 * boundaries
        if len(index) != expected:
            raise DetourError(f"{idx_path(prefix)}: has {len(index):,} bytes where its header means {expected:,}")
        self.dtype = np.dtype(TYPES[code])
        self.lengths = np.frombuffer(index, "<i4", sequences, HEADER.size)
        self.offsets = np.frombuffer(index, "<i8", sequences, HEADER.size + 4 * sequences)
        self.documents = np.frombuffer(index, "<i8", boundaries, HEADER.size + 12 * sequences)
        content = _mapped(bin_path(prefix), prefix)
        needed = int(self.offsets[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if sequences else 0
        if needed != len(content):
            raise DetourError(f"{bin_path(prefix)}: has {len(content):,} bytes where the index means {needed:,}")
        self._bin = np.frombuffer(content, self.dtype)

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, document: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """The ids of a document, or `length` of them from `start` on: shape [length], read only."""
        first = int(self.offsets[document]) // self.dtype.itemsize + start
        count = int(self.lengths[document]) - start if length is None else length
        return self._bin[first : first + count]

    @property
    def total_tokens(self) -> int:
        return len(self._bin)

    def stretch(self, start: int, length: int) -> np.ndarray:
        """`length` ids from the corpus's token `start` on, or as many as there are, across documents."""
        return self._bin[start : start + length]

    def sample(self, tokens: int, stretches: int = 200) -> np.ndarray:
        """About `tokens` ids from evenly spaced stretches of the corpus, or all of them if it has no more."""
        if len(self._bin) <= tokens:
            return self._bin
        length = tokens // stretches
        starts = np.linspace(0, len(self._bin) - length, stretches).astype(np.int64)
        return np.concatenate([self._bin[start : start + length] for start in starts])


def write_index(path: Path, lengths: np.ndarray, dtype: np.dtype) -> None:
    """Writes an index with a sequence a document, in constant memory.

    lengths: int32 [documents], in tokens of `dtype`; it may be a mapped file.
    """
    chunks = [lengths[start : start + CHUNK] for start in range(0, len(lengths), CHUNK)]
    with path.open("wb") as out:
        out.write(HEADER.pack(MAGIC, 1, CODES[dtype], len(lengths), len(lengths) + 1))
        for chunk in chunks:
            out.write(chunk.astype("<i4").data)
        offset = 0
        for chunk in chunks:
            ends = offset + np.cumsum(chunk, dtype="<i8") * dtype.itemsize
            out.write((ends - chunk.astype("<i8") * dtype.itemsize).data)
            offset = int(ends[-1])
        for start in range(0, len(lengths) + 1, CHUNK):
            out.write(np.arange(start, min(start + CHUNK, len(lengths) + 1), dtype="<i8").data)


def _mapped(path: Path, prefix: str | Path) -> mmap.mmap | bytes:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
    except FileNotFoundError:
        raise DetourError(
            f"{path}: there is no such file; build the corpus with tools/preprocess_data.py --output-prefix {prefix}"
        ) from None
