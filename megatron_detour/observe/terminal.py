"""Tables and sentences for a terminal of 80 columns."""

from __future__ import annotations

import textwrap

from megatron_detour.observe.words import shortened
from megatron_detour.text import visible

WIDTH = 80
FIRST = 34  # characters of the first column at most


def wrapped(text: str) -> str:
    """The sentence in lines, without a break inside a word."""
    return "\n".join(textwrap.wrap(visible(text), WIDTH, break_long_words=False, break_on_hyphens=False))


def columns(header: list[str], rows: list[list[str]]) -> str:
    """The table; columns that do not fit beside the first follow below, under it again."""
    cells = [
        [shortened(row[0], FIRST), *(shortened(text, WIDTH - FIRST - 2) for text in row[1:])] for row in [header, *rows]
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    blocks, taken = [[]], widths[0]
    for number, width in enumerate(widths[1:], start=1):
        if taken + 2 + width > WIDTH and blocks[-1]:
            blocks.append([])
            taken = widths[0]
        blocks[-1].append(number)
        taken += 2 + width
    return "\n\n".join(
        "\n".join(
            "  ".join([row[0].ljust(widths[0]), *(row[n].rjust(widths[n]) for n in block)]).rstrip() for row in cells
        )
        for block in blocks
    )
