"""Extracting texts from records: the keys of the text in a JSON line or a row, and why a record is invalid."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import msgspec
import numpy as np

MAX_LINE_BYTES = 256 << 20
LINE_END, COLON = ord("\n"), ord(":")
SAME_BITS = 0xFF ^ LINE_END ^ COLON  # in which the two agree
# Keys to suggest in messages. Nothing else of a record may be quoted: its keys may be names of people.
COMMON_KEYS = ("text", "content", "body", "note", "report", "abstract", "article", "document", "texte", "contenu")


class BadRecord(Exception):
    """A record is not a document; the message says why."""


class TooLong(bytes):
    """Placeholder for a line that was skipped."""


def checked(line: bytes) -> bytes:
    """Return the line. Raises BadRecord for a placeholder."""
    if isinstance(line, TooLong):
        raise BadRecord(f"longer than {MAX_LINE_BYTES >> 20} MiB")
    return line


def decoded(line: bytes) -> str:
    """Decode UTF-8. Raises BadRecord."""
    try:
        return checked(line).decode("utf-8")
    except UnicodeDecodeError:
        raise BadRecord("not UTF-8; if it is Latin-1: iconv -f WINDOWS-1252 -t UTF-8") from None


class TextKeys:
    """The keys of a record's text, where "a.b" is a key of this name or b inside a; texts of several keys are joined.

    An object with a duplicate of such a key is rejected, as it is ambiguous.
    """

    def __init__(self, keys: tuple[str, ...] = ("text",), separator: str = "\n") -> None:
        self.keys = keys
        self.separator = separator
        self.columns = tuple(dict.fromkeys(head for key in keys for head in _heads(key)))  # that may contain them
        self._names = {head for key in keys for tail in _tails(key) for head in _heads(tail)}
        self._spelled = [(f'"{name}":'.encode(), f'"{name}" :'.encode()) for name in self._names]
        self._decoder = msgspec.json.Decoder(_struct(keys[0].split(".")) if len(keys) == 1 else Any)

    def parse_lines(self, lines: bytes) -> tuple[list[str], int]:
        """Return the texts of complete JSON lines and the number of empty lines.

        All or none: raises ValueError and others if any line is in doubt. This fast parser parses only what it has to;
        after an error, use `parse_line` for each line.
        """
        content = np.frombuffer(lines, dtype=np.uint8)  # several times as fast to search as bytes
        marks = np.flatnonzero((content & SAME_BITS) == LINE_END)  # line ends, colons and a few others
        marked = content[marks]
        ends, colons = marks[marked == LINE_END], marks[marked == COLON]
        before, after = (content.take(ends + step, mode="clip") for step in (-1, 1))  # clipped: the line end itself
        # The parser reads consecutive records, regardless of lines. If every line that ends has "}" before its end, and
        # "{" follows every line end, no record can span lines; then as many records as filled lines means that each
        # line is one record.
        if not (((before == ord("}")) | (before == LINE_END)) & ((after == ord("{")) | (after == LINE_END))).all():
            raise ValueError("not one object per line")
        count = int(np.count_nonzero(after == ord("{"))) + (lines[0] != LINE_END)
        if any(sum(_occurrences(content, colons, s) for s in spellings) > count for spellings in self._spelled):
            raise ValueError("perhaps a duplicate key")
        records = self._decoder.decode_lines(lines)
        if len(records) != count:
            raise ValueError("not one object per line")
        return self._texts(records), len(ends) + (lines[-1] != LINE_END) - count

    def _texts(self, records: list[Any]) -> list[str]:
        if len(self.keys) > 1:
            return [self.extract(record) for record in records]
        if "." in self.keys[0]:
            return [_inner(record) for record in records]
        return [record.value for record in records]

    def parse_line(self, line: bytes) -> str:
        """Return the text of a JSON line, parsed by Python's json; "" for a blank line. Raises BadRecord."""
        text = decoded(line)
        if not text or text.isspace():
            return ""
        try:
            record = json.loads(text, object_pairs_hook=self._mapping)
        except (ValueError, RecursionError) as error:  # ValueError also for numbers of thousands of digits
            raise BadRecord(f"invalid JSON ({error})") from None
        return self.extract(record)

    def extract(self, record: Any) -> str:
        """Return the text of a parsed record. Raises BadRecord."""
        if not isinstance(record, dict):
            raise BadRecord('not a JSON object such as {"text": "..."}')
        return self.separator.join(_checked_text(record, key) for key in self.keys)

    def _mapping(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) < len(pairs):
            names = [name for name, _ in pairs if name in self._names]
            if len(names) > len(set(names)):
                raise BadRecord(f"duplicate key {Counter(names).most_common(1)[0][0]!r}")
        return mapping


def _occurrences(content: np.ndarray, ends: np.ndarray, word: bytes) -> int:
    """Return how often a word occurs in content, uint8 [bytes]; ends: int64, the places of the word's last byte."""
    ends = ends[ends >= len(word) - 1]
    for back, byte in enumerate(word[-2::-1], start=1):
        ends = ends[content[ends - back] == byte]
    return len(ends)


def _heads(key: str) -> list[str]:
    """Return a, a.b and a.b.c for a.b.c."""
    parts = key.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _tails(key: str) -> list[str]:
    """Return a.b.c, b.c and c for a.b.c."""
    parts = key.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _checked_text(record: dict[str, Any], key: str) -> str:
    """Return the text under a key. Raises BadRecord without quoting the record, as keys may be names of people."""
    text = _under(record, key)
    if text is msgspec.UNSET:
        hint = next((f" (there is {name!r})" for name in COMMON_KEYS if name in record), "")
        raise BadRecord(f"no key {key!r}{hint}; set --text-key to the key of the text")
    if text is None:
        raise BadRecord(f"the value of {key!r} is null")
    if isinstance(text, dict):
        raise BadRecord(f"the value of {key!r} is an object; use --text-key {key}.NAME for the text under NAME in it")
    if not isinstance(text, str):
        raise BadRecord(f"the value of {key!r} is not a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRecord(f"the text of {key!r} contains a lone surrogate") from None
    return text


def _under(record: Any, key: str) -> Any:
    """Return the value under a key of this name or else, for "a.b", under b inside a; UNSET if there is none."""
    if not isinstance(record, dict):
        return msgspec.UNSET
    if key in record:
        return record[key]
    inside = (_under(record[head], key[len(head) + 1 :]) for head in _heads(key)[:-1] if head in record)
    return next((value for value in inside if value is not msgspec.UNSET), msgspec.UNSET)


def _struct(parts: list[str]) -> type:
    """Return a msgspec type that reads only the text under a key, for `_inner`."""
    if len(parts) == 1:
        return msgspec.defstruct("Record", [("value", str, msgspec.field(name=parts[0]))], gc=False)
    names = {"spelled": (str, ".".join(parts)), "value": (_struct(parts[1:]), parts[0])}
    fields = [
        (n, kind | msgspec.UnsetType, msgspec.field(name=key, default=msgspec.UNSET))
        for n, (kind, key) in names.items()
    ]
    return msgspec.defstruct("Record", fields, gc=False)


def _inner(record: Any) -> str:
    while isinstance(record, msgspec.Struct):
        spelled = getattr(record, "spelled", msgspec.UNSET)
        record = record.value if spelled is msgspec.UNSET else spelled
    if record is msgspec.UNSET:
        raise ValueError("no such key")
    return record
