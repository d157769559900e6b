"""Reading the documents of an input shard, and its invalid records with the reason for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from megatron_detour.corpus.lines import (
    BYTE_ORDER_MARK,
    check_encoding,
    decompressed,
    lines_before,
    read_errors,
    whole_lines,
)
from megatron_detour.corpus.records import MAX_LINE_BYTES, BadRecord, TextKeys, TooLong, decoded
from megatron_detour.corpus.sources import InputShard, is_json_lines, open_hub, open_saved, plan_shards
from megatron_detour.errors import DetourError, brief

if TYPE_CHECKING:
    from pyarrow import RecordBatch

FAST_PARSER_ERRORS = (msgspec.MsgspecError, ValueError, RecursionError, BadRecord)
ROWS, ROW_BYTES = 256, 1 << 22  # of Parquet or a dataset: the most read at a time


@dataclass
class Block:
    """Documents that were read together. A record is a line, a row, or a whole file."""

    records: int = 0
    empty: int = 0
    texts: list[str] = field(default_factory=list)
    rejects: list[tuple[int, str]] = field(default_factory=list)  # index of the record in the shard, reason

    def add(self, number: int, read: Callable[[], str]) -> None:
        """Count a record as a document, as empty or as a reject."""
        try:
            self.add_texts([read()])
        except BadRecord as reason:
            self.records += 1
            self.rejects.append((number, str(reason)))

    def skip(self, count: int) -> None:
        """Count empty records."""
        self.records += count
        self.empty += count

    def add_texts(self, texts: list[str]) -> None:
        """Count records by their texts, which may be blank."""
        filled = [text for text in texts if text and not text.isspace()]
        self.records += len(texts)
        self.empty += len(texts) - len(filled)
        self.texts += filled


def read_documents(path: Path, text_key: str = "text") -> Iterator[str]:
    """Yield the non-blank documents of an input. Raises DetourError with the line of the first invalid record."""
    for shard in plan_shards([str(path)]):
        for block in read_shard(shard, TextKeys((text_key,))):
            if block.rejects:
                number, reason = block.rejects[0]
                raise DetourError(f"{path}, line {records_before(shard) + number + 1:,}: {reason}")
            yield from block.texts


def read_shard(shard: InputShard, keys: TextKeys, report: Callable[[int], None] = lambda read: None) -> Iterator[Block]:
    """Yield the documents of a shard in blocks of about BLOCK_BYTES; `report` gets the bytes read since its last call.

    Raises DetourError for a file that cannot be read to its end.
    """
    readers = {"parquet": _parquet_rows, "dataset": _dataset_rows, "streamed": _streamed_rows}
    if shard.kind in readers:
        yield from _row_blocks(readers[shard.kind](shard, keys), keys)
        report(shard.size)
    elif shard.kind == "file":
        yield _file_block(shard)
        report(shard.size)
    else:
        yield from _line_blocks(shard, keys, report)


def records_before(shard: InputShard) -> int:
    """Return the number of records of the same file or dataset before a shard."""
    if shard.kind == "parquet":
        from pyarrow.parquet import read_metadata

        groups = read_metadata(shard.path)
        return sum(groups.row_group(group).num_rows for group in range(shard.start))
    if shard.kind == "lines" and shard.start:
        return lines_before(shard.path, shard.start)
    return shard.start if shard.kind == "dataset" else 0


def _file_block(shard: InputShard) -> Block:
    block = Block()
    with Path(shard.path).open("rb") as raw, read_errors(shard.path):
        content = decompressed(raw, shard.path).read(MAX_LINE_BYTES + 1)
    check_encoding(content, shard.path)
    text = content.removeprefix(BYTE_ORDER_MARK) if len(content) <= MAX_LINE_BYTES else TooLong()
    block.add(0, lambda: decoded(text))
    return block


def _line_blocks(shard: InputShard, keys: TextKeys, report: Callable[[int], None]) -> Iterator[Block]:
    parse_all = keys.parse_lines if is_json_lines(shard.path) else _plain_texts
    parse_one = (lambda line: _parse_line(line, keys)) if is_json_lines(shard.path) else _plain_text
    reported = number = 0
    with Path(shard.path).open("rb") as raw:
        several = whole_lines(raw, shard)
        while True:
            with read_errors(shard.path):
                lines = next(several, None)
            if lines is None:
                break
            block = _lines_block(lines, number, parse_all, parse_one)
            number += block.records
            yield block
            done = min(max(raw.tell() - shard.start, 0), shard.size)
            report(done - reported)
            reported = done
    report(shard.size - reported)


def _lines_block(
    lines: bytes, first: int, parse_all: Callable[[bytes], tuple[list[str], int]], parse_one: Callable[[bytes], str]
) -> Block:
    """Return the documents of lines: parsed all at once if `parse_all` succeeds, else line by line."""
    block = Block()
    if isinstance(lines, TooLong):
        block.add(first, lambda: decoded(lines))
        return block
    try:
        texts, blank = parse_all(lines)
        block.add_texts(texts)
        block.skip(blank)
    except FAST_PARSER_ERRORS:
        for number, line in enumerate(lines.removesuffix(b"\n").split(b"\n"), start=first):
            if line:
                block.add(number, lambda line=line: parse_one(line))
            else:
                block.skip(1)
    return block


def _parse_line(line: bytes, keys: TextKeys) -> str:
    """Try the fast parser first here, too: how a line is parsed must not depend on its neighbors."""
    try:
        return keys.parse_lines(line)[0][0]
    except FAST_PARSER_ERRORS:
        return keys.parse_line(line)


def _plain_texts(lines: bytes) -> tuple[list[str], int]:
    """Return the texts of filled lines, and the number of empty lines."""
    rows = lines.decode("utf-8").removesuffix("\n").split("\n")
    texts = [row.removesuffix("\r") for row in rows if row]  # a file may consist mostly of line ends
    return texts, len(rows) - len(texts)


def _plain_text(line: bytes) -> str:
    return decoded(line.removesuffix(b"\r"))


def _row_blocks(rows: Iterator[dict[str, Any] | BadRecord], keys: TextKeys) -> Iterator[Block]:
    """Yield blocks of at most ROWS records, or of about ROW_BYTES of text."""
    block, characters = Block(), 0
    for number, record in enumerate(rows):
        before = len(block.texts)
        block.add(number, lambda record=record: _row_text(record, keys))
        characters += sum(map(len, block.texts[before:]))
        if block.records == ROWS or characters >= ROW_BYTES:
            yield block
            block, characters = Block(), 0
    if block.records:
        yield block


def _row_text(record: dict[str, Any] | BadRecord, keys: TextKeys) -> str:
    if isinstance(record, BadRecord):
        raise record
    return keys.extract(record)


def _batch_rows(size: int, rows: int) -> int:
    """Return how many rows of a table of `size` bytes are about ROW_BYTES, at most ROWS."""
    return max(1, min(ROWS, ROW_BYTES * rows // max(size, 1)))


def _parquet_rows(shard: InputShard, keys: TextKeys) -> Iterator[dict[str, Any] | BadRecord]:
    from pyarrow.parquet import ParquetFile

    with read_errors(shard.path), ParquetFile(shard.path, pre_buffer=False, buffer_size=ROW_BYTES) as file:
        columns = [name for name in keys.columns if name in file.schema_arrow.names]
        for group in range(shard.start, shard.end):
            metadata = file.metadata.row_group(group)
            rows = _batch_rows(metadata.total_byte_size, metadata.num_rows)
            for batch in file.iter_batches(rows, row_groups=[group], columns=columns or None, use_threads=False):
                for number in range(len(batch)):
                    yield _row(batch, number)


def _row(batch: RecordBatch, number: int) -> dict[str, Any] | BadRecord:
    try:
        return batch.slice(number, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return BadRecord("not UTF-8")


def _dataset_rows(shard: InputShard, keys: TextKeys) -> Iterator[dict[str, Any]]:
    dataset = open_hub(shard.dataset) if shard.dataset else open_saved(shard.path)
    names = [name for name in keys.columns if name in dataset.column_names]
    dataset = dataset.select_columns(names) if names else dataset
    rows = _batch_rows(shard.size, shard.end - shard.start)
    for start in range(shard.start, shard.end, rows):
        columns = dataset[start : min(start + rows, shard.end)]
        yield from (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))


def _streamed_rows(shard: InputShard, keys: TextKeys) -> Iterator[dict[str, Any]]:
    try:
        yield from open_hub(shard.dataset).shard(num_shards=shard.end, index=shard.start)
    except DetourError:
        raise
    except Exception as error:  # of the network or of any format that datasets reads
        raise DetourError(f"{shard.path}: cannot be read to its end: {brief(error)}") from None
