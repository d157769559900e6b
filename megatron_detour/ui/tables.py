"""Tables and sentences for a terminal, of 80 columns or as wide as it is."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_detour.text import visible

WIDTH = 80
GAP = 2
LONGEST_NAME = 26  # characters of a line; names go on in the next one
HEADER_LINES = 3
MARKS = re.compile(r"(?<=[-_./:])")


def wrapped(text: str) -> str:
    """The sentence in lines, without a break inside a word."""
    return "\n".join(textwrap.wrap(visible(text), WIDTH, break_long_words=False, break_on_hyphens=False))


def columns(header: list[str], rows: list[list[str]]) -> str:
    """The table of print_table with a column of names, as text of 80 columns."""
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None)
    shown = [[visible(" ".join(text.split())) for text in row] for row in [header, *rows]]
    print_table(console, "", shown[0], [[Text(text) for text in row] for row in shown[1:]], words=1)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()).strip("\n")


def print_table(
    console: Console, title: str, headers: Sequence[str], rows: Sequence[Sequence[Text]], words: int
) -> None:
    """Prints a table whose first `words` columns hold names and stand in each block, the others figures; columns that
    do not fit beside each other stand in blocks below each other.

    Headers and names break at spaces, long words of them at their marks, figures only where they are wider than all.
    """
    names = [at < words for at in range(len(headers))]
    rows = [[_broken(cell, LONGEST_NAME) if at < words else cell for at, cell in enumerate(row)] for row in rows]
    widths = [_width(header, column) for header, *column in zip(headers, *rows, strict=True)]
    left = console.width - sum(width + GAP for width, name in zip(widths, names, strict=True) if name)
    widths = [width if name else max(1, min(width, left)) for width, name in zip(widths, names, strict=True)]
    blocks: list[list[int]] = [[]]
    for at in range(words, len(headers)):
        if blocks[-1] and sum(widths[i] + GAP for i in [*blocks[-1], at]) > left + GAP:
            blocks.append([])
        blocks[-1].append(at)
    for number, block in enumerate(blocks):
        shown = Table(title=Text(title if not number else "", "bold") or None, title_justify="left", box=None,
                      show_header=any(headers), pad_edge=False, padding=(0, GAP, 0, 0))  # fmt: skip
        for at in [*range(words), *block]:
            head = Text("\n".join(_lines(headers[at], widths[at])))
            shown.add_column(head, justify="left" if names[at] else "right", overflow="fold", min_width=widths[at])
        for row in rows:
            shown.add_row(*(row[at] if names[at] else _broken(row[at], widths[at]) for at in [*range(words), *block]))
        console.print(shown)
        console.print()


def _width(header: str, cells: Sequence[Text]) -> int:
    """That of the longest cell and of a header in about three lines."""
    words = [line for word in header.split() for line in _lines(word, LONGEST_NAME)]
    lines = [line for cell in cells for line in cell.plain.split("\n")]
    return max(1, min(-(-len(header) // HEADER_LINES), LONGEST_NAME), *map(len, words), *map(len, lines))


def _broken(cell: Text, width: int) -> Text:
    return Text("\n".join(part for line in cell.plain.split("\n") for part in _lines(line, width)), cell.style)


def _lines(text: str, width: int) -> list[str]:
    """The text in lines of this many characters: broken at spaces, a longer word at its marks, and else anywhere."""
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
