"""The documents of a stretch of input, and the records that are none with the reason for each."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec

from megatron_detour.data.records import LONGEST_LINE, BadRecord, TextKeys, TooLong, checked, decoded
from megatron_detour.data.sources import Stretch, is_compressed, is_json_lines, open_hub, open_saved, plan_stretches
from megatron_detour.errors import DetourError

if TYPE_CHECKING:
    from pyarrow import RecordBatch

BLOCK_BYTES = 1 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
NOT_PLAIN = (msgspec.MsgspecError, ValueError, RecursionError, BadRecord)  # what the fast parser raises
ROWS = 256  # of Parquet or a dataset, read at once


@dataclass
class Block:
    """Documents that were read together. A record is a line, a row or, for whole files, a file."""

    records: int = 0
    empty: int = 0
    texts: list[str] = field(default_factory=list)
    rejects: list[tuple[int, str]] = field(default_factory=list)  # number of the record in the stretch, reason

    def take(self, number: int, text_of: Callable[[], str]) -> None:
        """Counts a record as a document, as an empty one or as a reject."""
        try:
            self.take_texts([text_of()])
        except BadRecord as reason:
            self.records += 1
            self.rejects.append((number, str(reason)))

    def take_texts(self, texts: list[str]) -> None:
        """Counts records, all of them with a text that may be blank."""
        filled = [text for text in texts if text and not text.isspace()]
        self.records += len(texts)
        self.empty += len(texts) - len(filled)
        self.texts += filled


def read_documents(path: Path, text_key: str = "text") -> Iterator[str]:
    """Yields the documents of an input, without blank ones. Raises DetourError with the line of the first bad one."""
    for stretch in plan_stretches([str(path)]):
        for block in read_stretch(stretch, TextKeys((text_key,))):
            if block.rejects:
                number, reason = block.rejects[0]
                raise DetourError(f"{path}, line {records_before(stretch) + number + 1:,}: {reason}")
            yield from block.texts


def read_stretch(
    stretch: Stretch, keys: TextKeys, report: Callable[[int], None] = lambda read: None
) -> Iterator[Block]:
    """Yields the documents of a stretch in blocks of about BLOCK_BYTES; `report` gets the bytes read since last time.

    Raises DetourError for a file that cannot be read to its end.
    """
    readers = {"parquet": _parquet_rows, "dataset": _dataset_rows, "streamed": _streamed_rows}
    if stretch.kind in readers:
        yield from _row_blocks(readers[stretch.kind](stretch, keys), keys)
        report(stretch.size)
    elif stretch.kind == "file":
        yield _file_block(stretch)
        report(stretch.size)
    else:
        yield from _line_blocks(stretch, keys, report)


def records_before(stretch: Stretch) -> int:
    """How many records of the same file or dataset lie before a stretch."""
    if stretch.kind == "parquet":
        from pyarrow.parquet import read_metadata

        groups = read_metadata(stretch.path)
        return sum(groups.row_group(group).num_rows for group in range(stretch.start))
    if stretch.kind != "lines" or not stretch.start:
        return stretch.start if stretch.kind == "dataset" else 0
    lines, left = 1, stretch.start - 1  # the line that holds the byte before the stretch is another's
    with Path(stretch.path).open("rb") as file:
        while left and (block := file.read(min(left, BLOCK_BYTES))):
            lines += block.count(b"\n")
            left -= len(block)
    return lines


def _file_block(stretch: Stretch) -> Block:
    block = Block()
    with Path(stretch.path).open("rb") as raw, _read_errors(stretch.path):
        content = (_decompressed(raw, stretch.path) if is_compressed(stretch.path) else raw).read(LONGEST_LINE + 1)
    whole = content.removeprefix(BYTE_ORDER_MARK) if len(content) <= LONGEST_LINE else TooLong()
    block.take(0, lambda: decoded(whole))
    return block


@contextmanager
def _read_errors(path: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # pyarrow takes long to load, and some of its errors are ValueErrors.
        if not isinstance(error, (EOFError, OSError, zlib.error)) and "pyarrow" not in type(error).__module__:
            raise
        raise DetourError(f"{path}: cannot be read to its end: {error}") from None


def _line_blocks(stretch: Stretch, keys: TextKeys, report: Callable[[int], None]) -> Iterator[Block]:
    is_json = is_json_lines(stretch.path)
    reported = number = 0
    with Path(stretch.path).open("rb") as raw:
        several = whole_lines(raw, stretch)
        while True:
            with _read_errors(stretch.path):
                lines = next(several, None)
            if lines is None:
                break
            block = _json_block(lines, keys, number) if is_json else _text_block(lines, number)
            number += block.records
            yield block
            here = min(max(raw.tell() - stretch.start, 0), stretch.size)
            report(here - reported)
            reported = here
    report(stretch.size - reported)


def _json_block(lines: bytes, keys: TextKeys, first: int) -> Block:
    block = Block()
    try:
        block.take_texts(keys.fast_texts(lines))
    except NOT_PLAIN:
        for number, line in enumerate(_split(lines), start=first):
            block.take(number, lambda line=line: _either(line, keys))
    return block


def _either(line: bytes, keys: TextKeys) -> str:
    """What decides on a line must not depend on its neighbours: the fast parser first, for each line as for all."""
    try:
        return keys.fast_texts(checked(line))[0]
    except NOT_PLAIN:
        return keys.of_line(line)


def _text_block(lines: bytes, first: int) -> Block:
    block = Block()
    for number, line in enumerate(_split(lines), start=first):
        block.take(number, lambda line=line: decoded(checked(line).removesuffix(b"\r")))
    return block


def _split(lines: bytes) -> list[bytes]:
    return [lines] if isinstance(lines, TooLong) else lines.removesuffix(b"\n").split(b"\n")


def whole_lines(raw: BinaryIO, stretch: Stretch) -> Iterator[bytes]:
    """Yields the lines that begin in the stretch, as they are, some at a time; `raw` is the open file."""
    stream, owned = _opened(raw, stretch)
    rest = b""
    at_start = stretch.start == 0
    while block := stream.read(BLOCK_BYTES if owned is None else min(BLOCK_BYTES, owned)):
        if owned is not None:
            owned -= len(block)
            if not owned and not block.endswith(b"\n"):
                block += stream.readline(LONGEST_LINE)  # the line that begins here is ours to its end
        if at_start:
            block, at_start = block.removeprefix(BYTE_ORDER_MARK), False
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


def _pass_over_line(stream: BinaryIO, owned: int | None) -> int | None:
    while piece := stream.readline(BLOCK_BYTES):
        owned = owned if owned is None else max(owned - len(piece), 0)
        if piece.endswith(b"\n"):
            break
    return owned


def _opened(raw: BinaryIO, stretch: Stretch) -> tuple[BinaryIO, int | None]:
    """The stream of a stretch's text, and how many bytes on from there the last line of ours may begin."""
    if is_compressed(stretch.path):
        return _decompressed(raw, stretch.path), None
    if not stretch.start:
        return raw, stretch.end
    raw.seek(stretch.start - 1)  # the rest of a line that began before is another stretch's
    while (piece := raw.readline(BLOCK_BYTES)) and not piece.endswith(b"\n"):
        pass
    return raw, max(stretch.end - raw.tell(), 0)


def _decompressed(raw: BinaryIO, path: str) -> BinaryIO:
    if path.endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), BLOCK_BYTES)
    import pyarrow

    # zstandard's own reader ends a truncated file without a word; Arrow's says so.
    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd"), BLOCK_BYTES)


def _row_blocks(rows: Iterator[list[dict[str, Any] | BadRecord]], keys: TextKeys) -> Iterator[Block]:
    number = 0
    for some in rows:
        block = Block()
        for record in some:
            block.take(number, lambda record=record: _row_text(record, keys))
            number += 1
        yield block


def _row_text(record: dict[str, Any] | BadRecord, keys: TextKeys) -> str:
    if isinstance(record, BadRecord):
        raise record
    return keys.of_record(record)


def _parquet_rows(stretch: Stretch, keys: TextKeys) -> Iterator[list[dict[str, Any] | BadRecord]]:
    from pyarrow.parquet import ParquetFile

    with _read_errors(stretch.path), ParquetFile(stretch.path) as file:
        columns = [name for name in keys.roots if name in file.schema_arrow.names]
        groups = list(range(stretch.start, stretch.end))
        for batch in file.iter_batches(ROWS, row_groups=groups, columns=columns or None):
            try:
                yield batch.to_pylist()
            except UnicodeDecodeError:
                yield [_row_of(batch, number) for number in range(len(batch))]


def _row_of(batch: RecordBatch, number: int) -> dict[str, Any] | BadRecord:
    try:
        return batch.slice(number, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return BadRecord("not UTF-8")


def _dataset_rows(stretch: Stretch, keys: TextKeys) -> Iterator[list[dict[str, Any]]]:
    dataset = open_hub(stretch.dataset) if stretch.dataset else open_saved(stretch.path)
    known = [name for name in keys.roots if name in dataset.column_names]
    dataset = dataset.select_columns(known) if known else dataset
    for start in range(stretch.start, stretch.end, ROWS):
        columns = dataset[start : min(start + ROWS, stretch.end)]
        yield [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _streamed_rows(stretch: Stretch, keys: TextKeys) -> Iterator[list[dict[str, Any]]]:
    shard = open_hub(stretch.dataset).shard(num_shards=stretch.end, index=stretch.start)
    rows = iter(shard)
    try:
        while some := list(islice(rows, ROWS)):
            yield some
    except Exception as error:  # of the network and of every format that datasets reads
        raise DetourError(f"{stretch.path}: cannot be read to its end: {error}") from None
