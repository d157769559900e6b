"""Megatron's indexed dataset: raw token ids in PREFIX.bin, the location of each document in PREFIX.idx (little endian).

offset   field of .idx
0        magic "MMIDIDX\\0\\0", 9 bytes
9        version, u64 = 1
17       dtype code of the ids, u8: 8 = uint16, 4 = int32
18       N, u64: sequences (here one per document)
26       D, u64: documents + 1
34       int32[N] lengths in tokens
34+4N    int64[N] byte offsets into .bin
34+12N   int64[D] document boundaries as sequence indices, from 0 to N
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path
from typing import IO

import numpy as np

from megatron_detour.errors import DetourError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CODES = {np.dtype(t): code for code, t in DTYPES.items()}
CHUNK = 1 << 20  # documents processed at a time
MAPPED_BYTES = 1 << 26  # pages of the index that random lookups keep in memory


def token_type(vocabulary_size: int) -> np.dtype:
    """Return the dtype that Megatron chooses for a vocabulary: uint16 below 65,500 ids, else int32."""
    return np.dtype(np.uint16 if vocabulary_size < 65_500 else np.int32)


def bin_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


class IndexedCorpus:
    """A memory-mapped corpus. Opening it reads only the header; `tokens(i)` is a view of document i's ids."""

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        index = _mapped(idx_path(prefix), prefix)
        if len(index) < HEADER.size:
            raise DetourError(f"{idx_path(prefix)}: too short for an index; rebuild the corpus")
        magic, version, code, sequences, boundaries = HEADER.unpack_from(index)
        if magic != MAGIC or version != 1 or code not in DTYPES:
            raise DetourError(f"{idx_path(prefix)}: not an index in Megatron's format, version 1; rebuild the corpus")
        expected = HEADER.size + 12 * sequences + 8 * boundaries
        if len(index) != expected:
            raise DetourError(f"{idx_path(prefix)}: {len(index):,} bytes instead of {expected:,}; rebuild the corpus")
        self.dtype = np.dtype(DTYPES[code])
        self.lengths = np.frombuffer(index, "<i4", sequences, HEADER.size)
        self.offsets = np.frombuffer(index, "<i8", sequences, HEADER.size + 4 * sequences)
        self.documents = np.frombuffer(index, "<i8", boundaries, HEADER.size + 12 * sequences)
        content = _mapped(bin_path(prefix), prefix)
        needed = int(self.offsets[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if sequences else 0
        if needed != len(content):
            raise DetourError(f"{bin_path(prefix)}: {len(content):,} bytes instead of {needed:,}; rebuild the corpus")
        self._bin = np.frombuffer(content, self.dtype)
        self.token_count = len(self._bin)
        self._index = index
        self._files = tuple(path(prefix).open("rb", buffering=0) for path in (idx_path, bin_path))

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self) -> tuple:
        return IndexedCorpus, (self.prefix,)  # another process reopens the files

    def read_lengths(self, first: int, last: int) -> np.ndarray:
        """Return the lengths of documents [first, last), int32, read without mapping. Raises DetourError if invalid."""
        lengths = np.empty(last - first, dtype="<i4")
        _read(self._files[0], memoryview(lengths).cast("B"), HEADER.size + 4 * first)
        if len(lengths) and not 0 <= lengths.min() <= lengths.max() <= self.token_count:
            raise self.mismatch()
        return lengths

    def locate(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return lengths in tokens and byte offsets in .bin, both int64 [n], of documents in any order.

        Raises DetourError if index and text do not match.
        """
        lengths, offsets = (np.empty(len(documents), dtype=np.int64) for _ in range(2))
        # In the order of the index, releasing pages on the way: otherwise all of it would count as this process's
        # memory.
        order = np.argsort(documents)
        for part in np.array_split(order, -(-len(self._index) // MAPPED_BYTES)):
            lengths[part] = self.lengths[documents[part]]
            offsets[part] = self.offsets[documents[part]]
            if len(self._index) > MAPPED_BYTES:
                self._index.madvise(mmap.MADV_DONTNEED)
        ends = offsets + lengths * self.dtype.itemsize
        if (lengths < 0).any() or (offsets < 0).any() or (ends > self.token_count * self.dtype.itemsize).any():
            raise self.mismatch()
        return lengths, offsets

    def read(self, places: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return the concatenated tokens of documents in the corpus's dtype: [sum of lengths].

        places: byte offset of each in .bin; lengths: in tokens; both int64 [documents]. Read without mapping, so that
        used text does not count as this process's memory. Raises DetourError for a truncated file.
        """
        tokens = np.empty(int(lengths.sum()), dtype=self.dtype)
        file, target, to = self._files[1], memoryview(tokens).cast("B"), 0
        descriptor, pread = file.fileno(), os.pread
        for place, count in zip(places.tolist(), (lengths * self.dtype.itemsize).tolist(), strict=True):
            content = pread(descriptor, count, place)
            if len(content) == count:
                target[to : to + count] = content
            else:
                _read(file, target[to : to + count], place)
            to += count
        return tokens

    def mismatch(self) -> DetourError:
        return DetourError(
            f"{idx_path(self.prefix)}: does not match {bin_path(self.prefix).name}: one of the two has changed since "
            "they were written; restore the files or rebuild the corpus"
        )

    def tokens(self, document: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """Return the ids of a document, or `length` of them from `start`: [length], read-only."""
        first = int(self.offsets[document]) // self.dtype.itemsize + start
        count = int(self.lengths[document]) - start if length is None else length
        return self._bin[first : first + count]

    def token_range(self, start: int, length: int) -> np.ndarray:
        """Return up to `length` ids from the corpus's token `start`, across documents."""
        return self._bin[start : start + length]

    def sample(self, tokens: int, ranges: int = 200) -> np.ndarray:
        """Return about `tokens` ids from evenly spaced ranges of the corpus, or all of a smaller one."""
        if len(self._bin) <= tokens:
            return self._bin
        length = tokens // ranges
        starts = np.linspace(0, len(self._bin) - length, ranges).astype(np.int64)
        return np.concatenate([self._bin[start : start + length] for start in starts])


def write_index(path: Path, lengths: np.ndarray, dtype: np.dtype) -> None:
    """Write an index with one sequence per document, in constant memory.

    lengths: int32 [documents], in tokens of `dtype`; may be memory-mapped.
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
            f"{path}: no such file; build the corpus with megatron-detour preprocess --output-prefix {prefix}"
        ) from None


def _read(file: IO[bytes], target: memoryview, place: int) -> None:
    """Fill `target` from byte `place` of a file. Raises DetourError if the file was truncated."""
    done = 0
    while done < len(target):
        content = os.pread(file.fileno(), len(target) - done, place + done)
        if not content:
            raise DetourError(f"{file.name}: truncated while in use; rebuild the corpus")
        target[done : done + len(content)] = content
        done += len(content)
