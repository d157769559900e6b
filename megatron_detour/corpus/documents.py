"""The documents of a stretch of input, and the records that are none with the reason for each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from megatron_detour.corpus.lines import (
    BYTE_ORDER_MARK,
    check_encoding,
    lines_before,
    read_errors,
    unpacked,
    whole_lines,
)
from megatron_detour.corpus.records import LONGEST_LINE, BadRecord, TextKeys, TooLong, decoded
from megatron_detour.corpus.sources import InputShard, is_json_lines, open_hub, open_saved, plan_shards
from megatron_detour.errors import DetourError, brief

if TYPE_CHECKING:
    from pyarrow import RecordBatch

NOT_PLAIN = (msgspec.MsgspecError, ValueError, RecursionError, BadRecord)  # what the fast parser raises
LINE_ENDS = re.compile(rb"\n{2,}")
ROWS, ROW_BYTES = 256, 1 << 22  # of Parquet or a dataset: no more are read at once


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

    def skip(self, count: int) -> None:
        """Counts empty records."""
        self.records += count
        self.empty += count

    def take_texts(self, texts: list[str]) -> None:
        """Counts records, all of them with a text that may be blank."""
        filled = [text for text in texts if text and not text.isspace()]
        self.records += len(texts)
        self.empty += len(texts) - len(filled)
        self.texts += filled


def read_documents(path: Path, text_key: str = "text") -> Iterator[str]:
    """Yields the documents of an input, without blank ones. Raises DetourError with the line of the first bad one."""
    for stretch in plan_shards([str(path)]):
        for block in read_shard(stretch, TextKeys((text_key,))):
            if block.rejects:
                number, reason = block.rejects[0]
                raise DetourError(f"{path}, line {records_before(stretch) + number + 1:,}: {reason}")
            yield from block.texts


def read_shard(
    stretch: InputShard, keys: TextKeys, report: Callable[[int], None] = lambda read: None
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


def records_before(stretch: InputShard) -> int:
    """How many records of the same file or dataset lie before a stretch."""
    if stretch.kind == "parquet":
        from pyarrow.parquet import read_metadata

        groups = read_metadata(stretch.path)
        return sum(groups.row_group(group).num_rows for group in range(stretch.start))
    if stretch.kind == "lines" and stretch.start:
        return lines_before(stretch.path, stretch.start)
    return stretch.start if stretch.kind == "dataset" else 0


def _file_block(stretch: InputShard) -> Block:
    block = Block()
    with Path(stretch.path).open("rb") as raw, read_errors(stretch.path):
        content = unpacked(raw, stretch.path).read(LONGEST_LINE + 1)
    check_encoding(content, stretch.path)
    whole = content.removeprefix(BYTE_ORDER_MARK) if len(content) <= LONGEST_LINE else TooLong()
    block.take(0, lambda: decoded(whole))
    return block


def _line_blocks(stretch: InputShard, keys: TextKeys, report: Callable[[int], None]) -> Iterator[Block]:
    texts_of = keys.fast_texts if is_json_lines(stretch.path) else _plain_texts
    text_of = (lambda line: _either(line, keys)) if is_json_lines(stretch.path) else _plain_text
    reported = number = 0
    with Path(stretch.path).open("rb") as raw:
        several = whole_lines(raw, stretch)
        while True:
            with read_errors(stretch.path):
                lines = next(several, None)
            if lines is None:
                break
            block = _lines_block(lines, number, texts_of, text_of)
            number += block.records
            yield block
            here = min(max(raw.tell() - stretch.start, 0), stretch.size)
            report(here - reported)
            reported = here
    report(stretch.size - reported)


def _lines_block(
    lines: bytes, first: int, texts_of: Callable[[bytes], list[str]], text_of: Callable[[bytes], str]
) -> Block:
    """The documents of lines: of all at once where `texts_of` finds nothing odd, else of one line after the other."""
    block = Block()
    if isinstance(lines, TooLong):
        block.take(first, lambda: decoded(lines))
        return block
    filled = LINE_ENDS.sub(b"\n", lines).strip(b"\n")  # a file may hold little but line ends
    try:
        block.take_texts(texts_of(filled) if filled else [])
        block.skip(lines.count(b"\n") + (not lines.endswith(b"\n")) - block.records)
    except NOT_PLAIN:
        for number, line in enumerate(lines.removesuffix(b"\n").split(b"\n"), start=first):
            if line:
                block.take(number, lambda line=line: text_of(line))
            else:
                block.skip(1)
    return block


def _either(line: bytes, keys: TextKeys) -> str:
    """What decides on a line must not depend on its neighbours: the fast parser first, for each line as for all."""
    try:
        return keys.fast_texts(line)[0]
    except NOT_PLAIN:
        return keys.of_line(line)


def _plain_texts(lines: bytes) -> list[str]:
    return [line.removesuffix("\r") for line in lines.decode("utf-8").split("\n")]


def _plain_text(line: bytes) -> str:
    return decoded(line.removesuffix(b"\r"))


def _row_blocks(rows: Iterator[dict[str, Any] | BadRecord], keys: TextKeys) -> Iterator[Block]:
    """Blocks of at most ROWS records, or of one whose texts came to ROW_BYTES."""
    block, characters = Block(), 0
    for number, record in enumerate(rows):
        known = len(block.texts)
        block.take(number, lambda record=record: _row_text(record, keys))
        characters += sum(map(len, block.texts[known:]))
        if block.records == ROWS or characters >= ROW_BYTES:
            yield block
            block, characters = Block(), 0
    if block.records:
        yield block


def _row_text(record: dict[str, Any] | BadRecord, keys: TextKeys) -> str:
    if isinstance(record, BadRecord):
        raise record
    return keys.of_record(record)


def _rows_at_once(size: int, rows: int) -> int:
    """How many rows of a table of `size` bytes are about ROW_BYTES, but at most ROWS."""
    return max(1, min(ROWS, ROW_BYTES * rows // max(size, 1)))


def _parquet_rows(stretch: InputShard, keys: TextKeys) -> Iterator[dict[str, Any] | BadRecord]:
    from pyarrow.parquet import ParquetFile

    with read_errors(stretch.path), ParquetFile(stretch.path, pre_buffer=False, buffer_size=ROW_BYTES) as file:
        columns = [name for name in keys.columns if name in file.schema_arrow.names]
        for group in range(stretch.start, stretch.end):
            facts = file.metadata.row_group(group)
            at_once = _rows_at_once(facts.total_byte_size, facts.num_rows)
            for batch in file.iter_batches(at_once, row_groups=[group], columns=columns or None, use_threads=False):
                for number in range(len(batch)):
                    yield _row_of(batch, number)


def _row_of(batch: RecordBatch, number: int) -> dict[str, Any] | BadRecord:
    try:
        return batch.slice(number, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return BadRecord("not UTF-8")


def _dataset_rows(stretch: InputShard, keys: TextKeys) -> Iterator[dict[str, Any]]:
    dataset = open_hub(stretch.dataset) if stretch.dataset else open_saved(stretch.path)
    known = [name for name in keys.columns if name in dataset.column_names]
    dataset = dataset.select_columns(known) if known else dataset
    at_once = _rows_at_once(stretch.size, stretch.end - stretch.start)
    for start in range(stretch.start, stretch.end, at_once):
        columns = dataset[start : min(start + at_once, stretch.end)]
        yield from (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))


def _streamed_rows(stretch: InputShard, keys: TextKeys) -> Iterator[dict[str, Any]]:
    shard = open_hub(stretch.dataset).shard(num_shards=stretch.end, index=stretch.start)
    try:
        yield from shard
    except Exception as error:  # of the network and of every format that datasets reads
        raise DetourError(f"{stretch.path}: cannot be read to its end: {brief(error)}") from None
