"""The documents of text files: JSON lines, plain or compressed, and text files with a document a line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from megatron_detour.errors import DetourError, nearest

KINDS = (".jsonl", ".jsonl.gz", ".txt")


class BadLine(Exception):
    """A line that is no document; the message says why."""


def check_kind(name: str) -> None:
    """Raises DetourError for a file that is missing or of an unknown kind."""
    if not Path(name).is_file():
        raise DetourError(f"{name}: there is no such input file")
    if not name.endswith(KINDS):
        raise DetourError(f"{name}: an input file must end in {', '.join(KINDS)}")


def document_of(line: bytes, name: str, text_key: str) -> str:
    """The document on a line of the file `name`; blank for a blank line. Raises BadLine."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        raise BadLine("not UTF-8") from None
    if name.endswith(".txt") or not text.strip():
        return text
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: JSON's own, and numbers of thousands of digits
        raise BadLine(f"not JSON ({error})") from None
    if not isinstance(record, dict):
        raise BadLine('not a JSON object such as {"text": "..."}')
    if text_key not in record:
        raise BadLine(f"no key {text_key!r}{nearest(text_key, list(record))}; --text-key names the key of the text")
    document = record[text_key]
    if not isinstance(document, str):
        raise BadLine(f"the value of {text_key!r} is not a text")
    try:
        document.encode("utf-8")
    except UnicodeEncodeError:
        raise BadLine(f"the text of {text_key!r} holds half a surrogate pair") from None
    return document


def read_documents(path: Path, text_key: str = "text") -> Iterator[str]:
    """Yields the documents of a file, without blank ones. Raises DetourError with the line of the first bad one."""
    check_kind(str(path))
    try:
        with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    text = document_of(line.rstrip(b"\r\n"), path.name, text_key)
                except BadLine as reason:
                    raise DetourError(f"{path}, line {number:,}: {reason}") from None
                if text.strip():
                    yield text
    except (OSError, EOFError, zlib.error) as error:
        raise DetourError(f"{path}: cannot be read to its end: {error}") from None
