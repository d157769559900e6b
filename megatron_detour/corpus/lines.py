"""The bytes of text files: unpacked, in whole lines, in UTF-8 or refused with the way to convert them."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_detour.corpus.records import LONGEST_LINE, TooLong
from megatron_detour.corpus.sources import InputShard, is_compressed
from megatron_detour.errors import DetourError, brief

BLOCK_BYTES = 1 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
OTHER_MARKS = {  # the longer ones first, as one begins with another
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
NULS, NUL_SHARE = 4, 0.02  # from which a block may be UTF-16: zero bytes, and their share
MOSTLY = 0.95  # of them lie in the same place of characters
LOOKED_AT, LOOKED_AT_BYTES = 16, 1 << 18  # of .txt files, to see whether they have lines
LONG_WINDOW = "requires too much memory"  # of zstd's message


@contextmanager
def read_errors(path: str) -> Iterator[None]:
    """What a file that cannot be read to its end raises becomes a DetourError."""
    try:
        yield
    except Exception as error:
        # pyarrow takes long to load, and some of its errors are ValueErrors.
        if not isinstance(error, (EOFError, OSError, zlib.error)) and "pyarrow" not in type(error).__module__:
            raise
        if LONG_WINDOW in str(error):
            raise DetourError(
                f"{path}: it was compressed with a longer window than is read here; unpack it with zstd -d --long=31 "
                f"{Path(path).name} and give the plain file, or compress that again"
            ) from None
        raise DetourError(f"{path}: cannot be read to its end: {brief(error)}") from None


def whole_lines(raw: BinaryIO, stretch: InputShard) -> Iterator[bytes]:
    """Yields the lines that begin in the stretch, as they are, some at a time; `raw` is the open file.

    Raises DetourError for text that is in UTF-16 or UTF-32.
    """
    stream, owned = _opened(raw, stretch)
    place = raw.tell() if owned is not None else 0
    rest = b""
    while block := stream.read(BLOCK_BYTES if owned is None else min(BLOCK_BYTES, owned)):
        if owned is not None:
            owned -= len(block)
            if not owned and not block.endswith(b"\n"):
                block += stream.readline(LONGEST_LINE)  # the line that begins here is ours to its end
        check_encoding(block, stretch.path, place)
        block, place = block if place else block.removeprefix(BYTE_ORDER_MARK), place + len(block)
        end = block.rfind(b"\n") + 1
        if end:
            yield rest + block[:end]
            rest = block[end:]
        else:
            rest += block
        if len(rest) > LONGEST_LINE:
            owned = _pass_over_line(stream, owned)
            rest = b""
            yield TooLong()
    if rest:
        yield rest


def check_encoding(block: bytes, path: str, place: int = 0) -> None:
    """Raises DetourError for UTF-16 and UTF-32, which pass for UTF-8; a block begins at byte `place` of the text."""
    mark = next((name for mark, name in OTHER_MARKS.items() if not place and block.startswith(mark)), None)
    if found := mark or _wide_encoding(block, place):
        unpack = "unpack it and " if is_compressed(path) else ""
        raise DetourError(f"{path}: its text is in {found}; {unpack}convert it: iconv -f {found} -t UTF-8")


def _wide_encoding(block: bytes, place: int) -> str | None:
    """UTF-16LE and so on, where NULs stand in the same place of nearly all characters, as in no text in UTF-8."""
    if block.count(0) < max(NULS, NUL_SHARE * len(block)):
        return None
    zero = np.frombuffer(block, np.uint8) == 0
    share = [zero[(start - place) % 4 :: 4].mean() if len(zero) > 3 else 0.0 for start in range(4)]
    first, last = min(share[:2]), min(share[2:])
    if max(first, last) > MOSTLY > min(first, last):
        return "UTF-32BE" if first > last else "UTF-32LE"
    even = (share[0] + share[2]) / sum(share)
    if max(even, 1 - even) < MOSTLY:
        return None
    return "UTF-16BE" if even > 0.5 else "UTF-16LE"


def _pass_over_line(stream: BinaryIO, owned: int | None) -> int | None:
    while piece := stream.readline(BLOCK_BYTES):
        owned = owned if owned is None else max(owned - len(piece), 0)
        if piece.endswith(b"\n"):
            break
    return owned


def _opened(raw: BinaryIO, stretch: InputShard) -> tuple[BinaryIO, int | None]:
    """The stream of a stretch's text, and how many bytes on from there the last line of ours may begin."""
    if is_compressed(stretch.path):
        return unpacked(raw, stretch.path), None
    if not stretch.start:
        return raw, stretch.end
    raw.seek(stretch.start - 1)  # the rest of a line that began before is another stretch's
    while (piece := raw.readline(BLOCK_BYTES)) and not piece.endswith(b"\n"):
        pass
    return raw, max(stretch.end - raw.tell(), 0)


def unpacked(raw: BinaryIO, path: str) -> BinaryIO:
    """The stream of a file's text; `raw` is the open file."""
    if path.endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), BLOCK_BYTES)
    if not is_compressed(path):
        return raw
    import pyarrow

    # zstandard's own reader ends a truncated file without a word; Arrow's says so.
    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd"), BLOCK_BYTES)


def check_text_files(names: list[str], tell: Callable[[str], None]) -> None:
    """Raises DetourError for several .txt files with lines, which may hold a document each or a document a line.

    A single one is taken a document a line, as a corpus in one file is, and `tell` gets a line about it.
    """
    looked_at = names[:: -(-len(names) // LOOKED_AT)] if names else []
    counts = [_count_lines(name) for name in looked_at]
    if not any(lines > 1 for lines, _ in counts):
        return
    share = sum(lines for lines, _ in counts) / max(sum(size for _, size in counts), 1)
    about = round(share * sum(Path(name).stat().st_size for name in names))
    if len(names) > 1:
        raise DetourError(
            f"{names[0]} and {len(names) - 1:,} more .txt files have several lines each: give --whole-files if each "
            f"file is a document ({len(names):,} documents), or --lines if each line is one (about {about:,})"
        )
    tell(f"{names[0]}: each of its about {about:,} lines is a document; with --whole-files the file is one")


def _count_lines(name: str) -> tuple[int, int]:
    """How many lines with text the beginning of a file has, and how many bytes on the disk that beginning is about."""
    with Path(name).open("rb") as raw, read_errors(name):
        beginning = unpacked(raw, name).read(LOOKED_AT_BYTES)
        size = raw.tell() if len(beginning) == LOOKED_AT_BYTES else Path(name).stat().st_size
    check_encoding(beginning, name)
    return sum(bool(line.strip()) for line in beginning.split(b"\n")), size


def lines_before(path: str, start: int) -> int:
    """How many lines of a plain file begin before byte `start`."""
    lines, left = 1, start - 1  # the line that holds the byte before is another's
    with Path(path).open("rb") as file:
        while left and (block := file.read(min(left, BLOCK_BYTES))):
            lines += block.count(b"\n")
            left -= len(block)
    return lines
