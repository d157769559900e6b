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
import os
import struct
from pathlib import Path
from typing import IO

import numpy as np

from megatron_detour.errors import DetourError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CODES = {np.dtype(t): code for code, t in TYPES.items()}
CHUNK = 1 << 20  # documents
MAPPED_BYTES = 1 << 26  # of an index that is looked up here and there


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
            raise DetourError(f"{idx_path(prefix)}: has {len(index):,} bytes where its header says {expected:,}")
        self.dtype = np.dtype(TYPES[code])
        self.lengths = np.frombuffer(index, "<i4", sequences, HEADER.size)
        self.offsets = np.frombuffer(index, "<i8", sequences, HEADER.size + 4 * sequences)
        self.documents = np.frombuffer(index, "<i8", boundaries, HEADER.size + 12 * sequences)
        content = _mapped(bin_path(prefix), prefix)
        needed = int(self.offsets[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if sequences else 0
        if needed != len(content):
            raise DetourError(f"{bin_path(prefix)}: has {len(content):,} bytes where its index says {needed:,}")
        self._bin = np.frombuffer(content, self.dtype)
        self.token_count = len(self._bin)
        self._index = index
        self._files = tuple(path(prefix).open("rb", buffering=0) for path in (idx_path, bin_path))

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self) -> tuple:
        return IndexedCorpus, (self.prefix,)  # another process opens the files again

    def read_lengths(self, first: int, last: int) -> np.ndarray:
        """The lengths of the documents from `first` to before `last`, int32, read and not mapped."""
        lengths = np.empty(last - first, dtype="<i4")
        _read(self._files[0], memoryview(lengths).cast("B"), HEADER.size + 4 * first)
        if len(lengths) and not 0 <= lengths.min() <= lengths.max() <= self.token_count:
            raise self.damage()
        return lengths

    def find(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lengths in tokens and offsets in .bin in bytes, both int64 [n], of documents in any order."""
        lengths, offsets = (np.empty(len(documents), dtype=np.int64) for _ in range(2))
        # From one end of the index to the other, leaving the pages behind: all of them would count as this process's
        # memory.
        order = np.argsort(documents)
        for part in np.array_split(order, -(-len(self._index) // MAPPED_BYTES)):
            lengths[part] = self.lengths[documents[part]]
            offsets[part] = self.offsets[documents[part]]
            if len(self._index) > MAPPED_BYTES:
                self._index.madvise(mmap.MADV_DONTNEED)
        ends = offsets + lengths * self.dtype.itemsize
        if (lengths < 0).any() or (offsets < 0).any() or (ends > self.token_count * self.dtype.itemsize).any():
            raise self.damage()
        return lengths, offsets

    def read(self, places: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The tokens of documents, one after the other, in the corpus's type: [sum of lengths].

        places: where in .bin each begins, in bytes; lengths: in tokens; both int64 [documents]. Read and not mapped, so
        that text that was used is not this process's memory.
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

    def damage(self) -> DetourError:
        return DetourError(
            f"{idx_path(self.prefix)}: lengths and offsets do not fit {bin_path(self.prefix).name}, so one of the two "
            "has changed since it was written; bring the files back or build the corpus again"
        )

    def tokens(self, document: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """The ids of a document, or `length` of them from `start` on: shape [length], read only."""
        first = int(self.offsets[document]) // self.dtype.itemsize + start
        count = int(self.lengths[document]) - start if length is None else length
        return self._bin[first : first + count]

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
            f"{path}: there is no such file; build the corpus with megatron-detour preprocess --output-prefix {prefix}"
        ) from None


def _read(file: IO[bytes], target: memoryview, place: int) -> None:
    """Fills `target` from a file's byte `place` on. Raises DetourError where the file is shorter than it was."""
    done = 0
    while done < len(target):
        content = os.pread(file.fileno(), len(target) - done, place + done)
        if not content:
            raise DetourError(f"{file.name}: became shorter while it was in use; build the corpus again")
        target[done : done + len(content)] = content
        done += len(content)
