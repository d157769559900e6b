"""Reading text files: decompression, complete lines, and detection of encodings other than UTF-8."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_detour.corpus.records import MAX_LINE_BYTES, TooLong
from megatron_detour.corpus.sources import InputShard, is_compressed
from megatron_detour.errors import DetourError, brief

BLOCK_BYTES = 1 << 19  # with its texts and ids it fits in a core's cache
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
WIDE_MARKS = {  # longer ones first, as one is a prefix of another
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
MIN_NULS, MIN_NUL_FRACTION = 4, 0.02  # a block with fewer zero bytes is not UTF-16
SAME_BYTE = 0.95  # fraction of the zero bytes at the same byte of a character in UTF-16 and UTF-32
SAMPLED_FILES, SAMPLED_BYTES = 16, 1 << 18  # of .txt files, to check whether they have lines
LONG_WINDOW = "requires too much memory"  # in zstd's message


@contextmanager
def read_errors(path: str) -> Iterator[None]:
    """Turn errors of reading a file into a DetourError."""
    try:
        yield
    except Exception as error:
        # Checked by name, as importing pyarrow takes long and some of its errors are ValueErrors.
        if not isinstance(error, (EOFError, OSError, zlib.error)) and "pyarrow" not in type(error).__module__:
            raise
        if LONG_WINDOW in str(error):
            raise DetourError(
                f"{path}: its compression window is too long; decompress it with zstd -d --long=31 {Path(path).name} "
                "and use the plain file, or compress it again without --long"
            ) from None
        raise DetourError(f"{path}: cannot be read to its end: {brief(error)}") from None


def whole_lines(raw: BinaryIO, shard: InputShard) -> Iterator[bytes]:
    """Yield the lines that begin in the shard, unchanged, several at a time; `raw` is the open file.

    Raises DetourError for text in UTF-16 or UTF-32.
    """
    stream, owned = _open_text(raw, shard)
    place = raw.tell() if owned is not None else 0
    rest: list[bytes] = []  # of a line whose end is yet to come
    while block := stream.read(BLOCK_BYTES if owned is None else min(BLOCK_BYTES, owned)):
        if owned is not None:
            owned -= len(block)
            if not owned and not block.endswith(b"\n"):
                block += stream.readline(MAX_LINE_BYTES)  # the last line that begins in the shard ends beyond it
        check_encoding(block, shard.path, place)
        block, place = block if place else block.removeprefix(BYTE_ORDER_MARK), place + len(block)
        end = block.rfind(b"\n") + 1
        if end:
            yield b"".join((*rest, memoryview(block)[:end]))
            rest = []
        if end < len(block):
            rest.append(block[end:])
        if sum(map(len, rest)) > MAX_LINE_BYTES:
            owned = _skip_line(stream, owned)
            rest = []
            yield TooLong()
    if rest:
        yield b"".join(rest)


def check_encoding(block: bytes, path: str, place: int = 0) -> None:
    """Raise DetourError for UTF-16 and UTF-32, which may decode as UTF-8. The block begins at byte `place`."""
    mark = next((name for mark, name in WIDE_MARKS.items() if not place and block.startswith(mark)), None)
    if encoding := mark or _wide_encoding(block, place):
        decompress = "decompress it and " if is_compressed(path) else ""
        raise DetourError(f"{path}: its text is in {encoding}; {decompress}convert it: iconv -f {encoding} -t UTF-8")


def _wide_encoding(block: bytes, place: int) -> str | None:
    """Return UTF-16LE and so on if nearly all zero bytes are at the same byte of a character, as never in UTF-8."""
    if 0 not in block or block.count(0) < max(MIN_NULS, MIN_NUL_FRACTION * len(block)):
        return None
    zero = np.frombuffer(block, np.uint8) == 0
    fraction = [zero[(start - place) % 4 :: 4].mean() if len(zero) > 3 else 0.0 for start in range(4)]
    first, last = min(fraction[:2]), min(fraction[2:])
    if max(first, last) > SAME_BYTE > min(first, last):
        return "UTF-32BE" if first > last else "UTF-32LE"
    even = (fraction[0] + fraction[2]) / sum(fraction)
    if max(even, 1 - even) < SAME_BYTE:
        return None
    return "UTF-16BE" if even > 0.5 else "UTF-16LE"


def _skip_line(stream: BinaryIO, owned: int | None) -> int | None:
    while piece := stream.readline(BLOCK_BYTES):
        owned = owned if owned is None else max(owned - len(piece), 0)
        if piece.endswith(b"\n"):
            break
    return owned


def _open_text(raw: BinaryIO, shard: InputShard) -> tuple[BinaryIO, int | None]:
    """Return the stream of a shard's text, and in how many of its bytes the shard's lines begin (None: in all)."""
    if is_compressed(shard.path):
        return decompressed(raw, shard.path), None
    if not shard.start:
        return raw, shard.end
    raw.seek(shard.start - 1)  # a line that began before belongs to the previous shard
    while (piece := raw.readline(BLOCK_BYTES)) and not piece.endswith(b"\n"):
        pass
    return raw, max(shard.end - raw.tell(), 0)


def decompressed(raw: BinaryIO, path: str) -> BinaryIO:
    """Return the stream of a file's text; `raw` is the open file."""
    if path.endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), BLOCK_BYTES)
    if not is_compressed(path):
        return raw
    import pyarrow

    # zstandard's own reader silently ends at a truncation; Arrow's raises an error.
    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd"), BLOCK_BYTES)


def check_text_files(names: list[str], notify: Callable[[str], None]) -> None:
    """Raise DetourError for several .txt files with several lines: a document may be a file or a line.

    In a single file each line is taken as a document, and `notify` gets a sentence that says so.
    """
    sampled = names[:: -(-len(names) // SAMPLED_FILES)] if names else []
    counts = [_count_lines(name) for name in sampled]
    if not any(lines > 1 for lines, _ in counts):
        return
    per_byte = sum(lines for lines, _ in counts) / max(sum(size for _, size in counts), 1)
    total = round(per_byte * sum(Path(name).stat().st_size for name in names))
    if len(names) > 1:
        raise DetourError(
            f"{names[0]} and {len(names) - 1:,} more .txt files have several lines: add --whole-files if each file is "
            f"a document ({len(names):,} documents), or --lines if each line is one (about {total:,})"
        )
    notify(f"{names[0]}: each of about {total:,} lines is a document; with --whole-files the file is one document")


def _count_lines(name: str) -> tuple[int, int]:
    """Return the number of non-blank lines at the beginning of a file, and the bytes on disk of that beginning."""
    with Path(name).open("rb") as raw, read_errors(name):
        beginning = decompressed(raw, name).read(SAMPLED_BYTES)
        size = raw.tell() if len(beginning) == SAMPLED_BYTES else Path(name).stat().st_size
    check_encoding(beginning, name)
    return sum(bool(line.strip()) for line in beginning.split(b"\n")), size


def lines_before(path: str, start: int) -> int:
    """Return the number of lines of an uncompressed file that begin before byte `start`."""
    lines, left = 1, start - 1  # the line with the byte before `start` belongs to the previous shard
    with Path(path).open("rb") as file:
        while left and (block := file.read(min(left, BLOCK_BYTES))):
            lines += block.count(b"\n")
            left -= len(block)
    return lines
