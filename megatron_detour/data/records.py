"""Records into texts: where a JSON line or a row keeps its text, and why some are no documents."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import numpy as np

from megatron_detour.errors import nearest

LONGEST_LINE = 256 << 20  # bytes


class BadRecord(Exception):
    """A record that is no document; the message says why."""


class TooLong(bytes):
    """Stands for a line that was passed over."""


def checked(line: bytes) -> bytes:
    """The line. Raises BadRecord for one that stands for a longer one."""
    if isinstance(line, TooLong):
        raise BadRecord(f"longer than {LONGEST_LINE >> 20} MiB")
    return line


def decoded(line: bytes) -> str:
    """The text of UTF-8 bytes. Raises BadRecord."""
    try:
        return checked(line).decode("utf-8")
    except UnicodeDecodeError:
        raise BadRecord("not UTF-8") from None


class TextKeys:
    """Where a record keeps its text: keys, "a.b" for b inside a; the texts of several keys are joined."""

    def __init__(self, keys: tuple[str, ...] = ("text",), separator: str = "\n") -> None:
        self.keys = keys
        self.separator = separator
        self.roots = tuple(dict.fromkeys(key.split(".")[0] for key in keys))
        self._paths = [key.split(".") for key in keys]
        self._decoder = msgspec.json.Decoder(_struct(self._paths[0]) if len(keys) == 1 else Any)

    def fast_texts(self, lines: bytes) -> list[str]:
        """The texts of whole JSON lines, all or none: raises ValueError and others where one is not plainly good.

        It parses no more than it must; whoever gets an error asks `of_line` line by line.
        """
        content = np.frombuffer(lines, dtype=np.uint8)  # several times as fast to search as bytes
        ends = np.flatnonzero(content[:-1] == ord("\n"))
        # The parser takes one record after the other, whatever the lines are. Where every line but the last ends with
        # "}" and every one but the first begins with "{", no record can go on into the next line, so that as many
        # records as lines are a record a line.
        if not ((content[ends - 1] == ord("}")) & (content[ends + 1] == ord("{"))).all():
            raise ValueError("not an object a line")
        records = self._decoder.decode_lines(lines)
        if len(records) != len(ends) + 1:
            raise ValueError("not an object a line")
        if len(self.keys) > 1:
            return [self.of_record(record) for record in records]
        for _ in self._paths[0][1:]:
            records = [record.value for record in records]
        return [record.value for record in records]

    def of_line(self, line: bytes) -> str:
        """The text of a JSON line as Python's own parser reads it; "" for a blank line. Raises BadRecord."""
        text = decoded(line)
        if not text or text.isspace():
            return ""
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:  # ValueError: JSON's own, and numbers of thousands of digits
            raise BadRecord(f"not JSON ({error})") from None
        return self.of_record(record)

    def of_record(self, record: Any) -> str:
        """The text of a record of dictionaries. Raises BadRecord."""
        if not isinstance(record, dict):
            raise BadRecord('not a JSON object such as {"text": "..."}')
        return self.separator.join(
            self._value(record, key, path) for key, path in zip(self.keys, self._paths, strict=True)
        )

    def _value(self, record: Any, key: str, path: list[str]) -> str:
        whole = record
        for name in path:
            if not isinstance(record, dict) or name not in record:
                raise BadRecord(f"no key {key!r}{nearest(key, _keys(whole))}; --text-key names the key of the text")
            record = record[name]
        if record is None:
            raise BadRecord(f"the value of {key!r} is null")
        if isinstance(record, dict):
            inside = ", ".join(f"{key}.{name}" for name in record)
            raise BadRecord(f"the value of {key!r} is an object; --text-key takes {inside}")
        if not isinstance(record, str):
            raise BadRecord(f"the value of {key!r} is not a text")
        try:
            record.encode("utf-8")
        except UnicodeEncodeError:
            raise BadRecord(f"the text of {key!r} holds half a surrogate pair") from None
        return record


def _keys(record: dict[str, Any]) -> list[str]:
    """The keys of a record, with "a.b" for those inside."""
    inside = [f"{name}.{key}" for name, value in record.items() if isinstance(value, dict) for key in _keys(value)]
    return [*record, *inside]


def _struct(path: list[str]) -> type:
    """A msgspec type that reads nothing of a record but the text at `path`, as .value.value..."""
    inner = _struct(path[1:]) if len(path) > 1 else str
    return msgspec.defstruct("Record", [("value", inner, msgspec.field(name=path[0]))], gc=False)
