"""What a page or a figure shows to its reader."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any


def words(page: Path) -> str:
    """The page's text without its tags, in single spaces."""
    return words_of(page.read_text(encoding="utf-8"))


def words_of(html: str) -> str:
    html = re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


def texts_of(figure: Any) -> list[Any]:
    """Every text that a figure shows."""
    from matplotlib.text import Text

    figure.draw_without_rendering()
    # A tick beyond the limits of its axis keeps its label.
    hidden = {
        id(label)
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in [*axis.majorTicks, *axis.minorTicks]
        for label in (tick.label1, tick.label2)
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    }
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    return [text for text in texts if id(text) not in hidden]


def refuse_overlaps(figure: Any) -> None:
    """Fails where two texts of the figure overlap by more than a hair, or one leaves the figure."""
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts_of(figure)]
    whole = figure.bbox
    for text, box in boxes:
        assert box.x0 >= whole.x0 - 2 and box.x1 <= whole.x1 + 2, f"{text!r} leaves the figure"
        assert box.y0 >= whole.y0 - 2 and box.y1 <= whole.y1 + 2, f"{text!r} leaves the figure"
    for (first, a), (second, b) in itertools.combinations(boxes, 2):
        width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert width <= 2 or height <= 3, f"{first!r} overlaps {second!r}"
