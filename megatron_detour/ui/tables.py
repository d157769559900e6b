"""Tables for a terminal, as Markdown and, with the macro `table` of parts.html.j2, in a page."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING
from unicodedata import combining, east_asian_width

from megatron_detour.text import markdown, visible

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 80
GAP = 2
LONGEST_NAME, LONGEST_TEXT = 26, 48  # characters per line; longer text is wrapped
HEADER_LINES = 3
ABSENT = "–"


class Formatted(str):
    """Text that already is Markdown."""


@dataclass(frozen=True)
class Entry:
    """A cell with a `note` in a softer color below it. In a page it has a CSS class (`style`) and a tooltip (`tip`)."""

    text: str
    bold: bool = False
    note: str = ""
    style: str = ""
    tip: str = ""


@dataclass
class Table:
    """`align` has an l or r per column; its last letter applies to all further columns.

    On a terminal, columns that do not fit side by side are split into blocks, and each block repeats the first `names`
    columns.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[Entry | str]]
    align: str = "lr"
    title: str = ""
    remarks: Sequence[str] = ()
    names: int = 1

    def __post_init__(self) -> None:
        self.rows = [[cell if isinstance(cell, Entry) else Entry(cell) for cell in row] for row in self.rows]
        self.align = self.align.ljust(len(self.headers), self.align[-1:] or "l")

    def without_empty_columns(self) -> Table:
        if not self.rows:
            return self
        kept = [at for at in range(len(self.headers)) if any(row[at].text for row in self.rows)]
        rows = [[row[at] for at in kept] for row in self.rows]
        align = "".join(self.align[at] for at in kept)
        return replace(self, headers=[self.headers[at] for at in kept], rows=rows, align=align)

    def markdown(self) -> str:
        """Return Markdown without title and remarks."""
        rules = ["---:" if align == "r" else "---" for align in self.align]
        lines = [[markdown(header) for header in self.headers], rules[: len(self.headers)]]
        lines += [[_markdown_cell(cell) for cell in row] for row in self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def text(self) -> str:
        """Return text for 80 columns, with the title and without the remarks."""
        return "\n".join("".join(text for text, _ in line).rstrip() for line in self._lines(WIDTH)).strip("\n")

    def print(self, console: Console) -> None:
        """Print the table without the remarks."""
        from rich.text import Text

        for line in self._lines(console.width):
            console.print(Text.assemble(*line), soft_wrap=True)

    def _lines(self, width: int) -> Iterator[list[tuple[str, str]]]:
        """Yield the parts of each line with their styles.

        Headers and text break at spaces, long words at punctuation, numbers only as a last resort.
        """
        headers = [_line(header) for header in self.headers]
        rows = [[self._cell_lines(at, cell) for at, cell in enumerate(row)] for row in self.rows]
        for lines in range(1, HEADER_LINES + 1):
            widths = [_width(header, lines, [row[at] for row in rows]) for at, header in enumerate(headers)]
            if sum(widths) + GAP * (len(widths) - 1) <= width:
                break
        left = width - sum(each + GAP for each in widths[: self.names])
        widths[self.names :] = [max(1, min(each, left)) for each in widths[self.names :]]
        if self.title:
            yield [(_line(self.title), "bold")]
        for block in _blocks(widths, self.names, left):
            if any(headers):
                cells = [_lines(headers[at], widths[at]) for at in block]
                deepest = max(map(len, cells))
                raised = [[""] * (deepest - len(lines)) + lines for lines in cells]
                yield from self._side_by_side(block, raised, widths, [""] * len(block))
            for row, entries in zip(rows, self.rows, strict=True):
                cells = [[part for line in row[at] for part in _lines(line, widths[at])] for at in block]
                yield from self._side_by_side(block, cells, widths, ["bold green" * entries[at].bold for at in block])
            yield []

    def _cell_lines(self, at: int, cell: Entry) -> list[str]:
        lines = [_line(text) for text in (cell.text, cell.note) if text]
        longest = LONGEST_NAME if at < self.names else LONGEST_TEXT
        return [part for line in lines for part in _lines(line, longest)] if self.align[at] == "l" else lines

    def _side_by_side(
        self, block: list[int], cells: list[list[str]], widths: list[int], styles: list[str]
    ) -> Iterator[list[tuple[str, str]]]:
        for parts in zip_longest(*cells, fillvalue=""):
            line = []
            for at, part, style in zip(block, parts, styles, strict=True):
                space = " " * (widths[at] - _room(part))
                before, after = (space, "") if self.align[at] == "r" else ("", space)
                line += [(before, ""), (part, style), (after + " " * (GAP if at != block[-1] else 0), "")]
            yield line


def wrapped(text: str) -> str:
    """Wrap a sentence without breaking words."""
    return "\n".join(textwrap.wrap(visible(text), WIDTH, break_long_words=False, break_on_hyphens=False))


def _line(text: str) -> str:
    return visible(" ".join(text.split()))


def _markdown_cell(cell: Entry) -> str:
    text = " ".join(part if isinstance(part, Formatted) else markdown(part) for part in (cell.text, cell.note) if part)
    return f"**{text}**" if cell.bold and text else text


def _blocks(widths: list[int], names: int, left: int) -> list[list[int]]:
    """Return the columns of each block: the names, and as many more as fit into `left` characters."""
    blocks: list[list[int]] = [[]]
    for at in range(names, len(widths)):
        if blocks[-1] and sum(widths[i] + GAP for i in [*blocks[-1], at]) > left + GAP:
            blocks.append([])
        blocks[-1].append(at)
    return [[*range(names), *block] for block in blocks]


def _width(header: str, header_lines: int, cells: Sequence[Sequence[str]]) -> int:
    """Return the width of the longest cell and of the header wrapped to about this many lines."""
    words = [line for word in header.split() for line in _lines(word, LONGEST_NAME)]
    lines = [line for cell in cells for line in cell]
    return max(1, min(-(-len(header) // header_lines), LONGEST_NAME), *map(_room, words), *map(_room, lines))


def _room(text: str) -> int:
    """Return the columns of a text: two for wide characters, none for combining ones."""
    return sum(0 if combining(each) else 1 + (east_asian_width(each) in "WF") for each in text)


def _lines(text: str, width: int) -> list[str]:
    """Wrap a text to this width: at spaces, longer words at punctuation, otherwise anywhere."""
    lines = [""]
    for word in text.split(" "):
        pieces = [word]
        if len(word) > width:
            pieces = [
                part for piece in re.split(r"(?<=[-_./:])", word) for part in re.findall(f".{{1,{width}}}", piece)
            ]
        for number, piece in enumerate(pieces):
            space = " " if lines[-1] and not number else ""
            if lines[-1] and len(lines[-1]) + len(space) + len(piece) > width:
                lines.append(piece)
            else:
                lines[-1] += space + piece
    return lines
