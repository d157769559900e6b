"""Tables on a terminal: columns that do not fit beside each other stand in blocks below each other."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

GAP = 2
LONGEST_NAME = 26  # characters of a line; names go on in the next one


def print_table(
    console: Console, title: str, headers: Sequence[str], rows: Sequence[Sequence[Text]], words: int
) -> None:
    """Prints a table whose first `words` columns hold names and stand in each block, the others figures.

    Headers break at spaces, long names at their marks, figures never.
    """
    table = [[_name(cell) if at < words else cell for at, cell in enumerate(row)] for row in rows]
    widths = [
        max(
            [
                1,
                *map(len, _in_lines(header).split()),
                *(len(line) for row in table for line in row[at].plain.split("\n")),
            ]
        )
        for at, header in enumerate(headers)
    ]
    heads = [Text("\n".join(_wrapped(header, width))) for header, width in zip(headers, widths, strict=True)]
    left = console.width - sum(width + GAP for width in widths[:words]) + GAP
    blocks: list[list[int]] = [[]]
    for at in range(words, len(heads)):
        if blocks[-1] and sum(widths[i] + GAP for i in [*blocks[-1], at]) > left:
            blocks.append([])
        blocks[-1].append(at)
    for number, block in enumerate(blocks):
        shown = Table(title=Text(title if not number else "", "bold") or None, title_justify="left", box=None,
                      pad_edge=False, padding=(0, GAP, 0, 0))  # fmt: skip
        for at in [*range(words), *block]:
            shown.add_column(
                heads[at], justify="left" if at < words else "right", overflow="fold", min_width=widths[at]
            )
        for row in table:
            shown.add_row(*(row[at] for at in [*range(words), *block]))
        console.print(shown)
        console.print()


def _wrapped(header: str, width: int) -> list[str]:
    return [
        line for part in _in_lines(header).split("\n") for line in textwrap.wrap(part, width, break_on_hyphens=False)
    ]


def _name(cell: Text) -> Text:
    return Text(_in_lines(cell.plain), cell.style)


def _in_lines(text: str) -> str:
    return " ".join(_broken(word) if len(word) > LONGEST_NAME else word for word in text.split(" "))


def _broken(word: str) -> str:
    lines = [""]
    for part in re.split(r"(?<=[-_./:])", word):
        if lines[-1] and len(lines[-1]) + len(part) > LONGEST_NAME:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
