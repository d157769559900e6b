"""Escaping of untrusted text for terminals, pages and Markdown."""

from __future__ import annotations

import re

# Control characters except tab and newline, direction marks, zero-width characters, line separators, lone surrogates.
# The joiners U+200C and U+200D are kept: scripts and emoji need them.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
_MARKS = re.compile(r"[\\`*\[\]<>|$~&]|(?<![^\W_])_|_(?![^\W_])")  # an underscore inside a word is no mark
_FIRST = re.compile(r"^([#+=-]+|\d+[.)])(?=\s|$)")  # starts a heading, a list, a rule or front matter


def visible(text: str) -> str:
    """Return `text` with invisible and control characters replaced by codes such as ``\\x1b``."""
    return _UNSEEN.sub(lambda match: _code(ord(match[0])), text)


def markdown(text: str) -> str:
    """Return `text` as one line that Markdown renders literally, in tables as well: no heading, list, tag or link."""
    line = visible(" ".join(text.split()))
    return _FIRST.sub(lambda match: f"{match[0][:-1]}\\{match[0][-1]}", _MARKS.sub(r"\\\g<0>", line))


def _code(number: int) -> str:
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
