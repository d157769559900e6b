"""Records into texts: where a JSON line or a row keeps its text, and why some are no documents."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import msgspec
import numpy as np

LONGEST_LINE = 256 << 20  # bytes
# That others keep their texts under. Of what a record holds nothing else may be told: its keys may be names of people.
USUAL_KEYS = ("text", "content", "body", "note", "report", "abstract", "article", "document", "texte", "contenu")


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
        raise BadRecord("not UTF-8; if it is Latin-1: iconv -f WINDOWS-1252 -t UTF-8") from None


class TextKeys:
    """Where a record keeps its text: the key of this name, or, for "a.b", b inside a; texts of several are joined.

    A key that appears twice in an object is refused where it is spelled alike, as nobody knows which text is meant.
    """

    def __init__(self, keys: tuple[str, ...] = ("text",), separator: str = "\n") -> None:
        self.keys = keys
        self.separator = separator
        self.columns = tuple(dict.fromkeys(head for key in keys for head in _heads(key)))  # that may hold them
        self._names = {head for key in keys for tail in _tails(key) for head in _heads(tail)}
        self._spelled = [(f'"{name}":'.encode(), f'"{name}" :'.encode()) for name in self._names]
        self._decoder = msgspec.json.Decoder(_struct(keys[0].split(".")) if len(keys) == 1 else Any)

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
        count = len(ends) + 1
        if any(sum(map(lines.count, spellings)) > count for spellings in self._spelled):
            raise ValueError("perhaps a key that appears twice")
        records = self._decoder.decode_lines(lines)
        if len(records) != count:
            raise ValueError("not an object a line")
        if len(self.keys) > 1:
            return [self.of_record(record) for record in records]
        if "." in self.keys[0]:
            return [_inner(record) for record in records]
        return [record.value for record in records]

    def of_line(self, line: bytes) -> str:
        """The text of a JSON line as Python's own parser reads it; "" for a blank line. Raises BadRecord."""
        text = decoded(line)
        if not text or text.isspace():
            return ""
        try:
            record = json.loads(text, object_pairs_hook=self._mapping)
        except (ValueError, RecursionError) as error:  # ValueError: JSON's own, and numbers of thousands of digits
            raise BadRecord(f"not JSON ({error})") from None
        return self.of_record(record)

    def of_record(self, record: Any) -> str:
        """The text of a record of dictionaries. Raises BadRecord."""
        if not isinstance(record, dict):
            raise BadRecord('not a JSON object such as {"text": "..."}')
        return self.separator.join(_checked_text(record, key) for key in self.keys)

    def _mapping(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) < len(pairs):
            names = [name for name, _ in pairs if name in self._names]
            if len(names) > len(set(names)):
                raise BadRecord(f"the key {Counter(names).most_common(1)[0][0]!r} appears twice")
        return mapping


def _heads(key: str) -> list[str]:
    """a, a.b and a.b.c of a.b.c."""
    parts = key.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _tails(key: str) -> list[str]:
    """a.b.c, b.c and c of a.b.c."""
    parts = key.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _checked_text(record: dict[str, Any], key: str) -> str:
    """Raises BadRecord, with nothing of the record in it: other keys may be names, too."""
    text = _under(record, key)
    if text is msgspec.UNSET:
        usual = next((f" (there is {name!r})" for name in USUAL_KEYS if name in record), "")
        raise BadRecord(f"no key {key!r}{usual}; --text-key names the key of the text")
    if text is None:
        raise BadRecord(f"the value of {key!r} is null")
    if isinstance(text, dict):
        raise BadRecord(f"the value of {key!r} is an object; --text-key {key}.NAME takes the text under NAME in it")
    if not isinstance(text, str):
        raise BadRecord(f"the value of {key!r} is not a text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRecord(f"the text of {key!r} holds half a surrogate pair") from None
    return text


def _under(record: Any, key: str) -> Any:
    """The value under a key, as it is spelled or else, for "a.b", under b inside a; UNSET for none."""
    if not isinstance(record, dict):
        return msgspec.UNSET
    if key in record:
        return record[key]
    inside = (_under(record[head], key[len(head) + 1 :]) for head in _heads(key)[:-1] if head in record)
    return next((value for value in inside if value is not msgspec.UNSET), msgspec.UNSET)


def _struct(parts: list[str]) -> type:
    """A msgspec type that reads nothing of a record but the text under a key, as `_inner` finds it."""
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
