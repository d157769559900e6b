"""Convert figures to PNG files, to SVG elements for pages, and to text descriptions."""

from __future__ import annotations

import io
import re
from html import escape
from typing import TYPE_CHECKING, Any

from megatron_detour.ui.colors import AXIS, INK, LINE, PALETTE, with_variables
from megatron_detour.ui.format import compact

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = ["-", (0, (5, 2)), (0, (1, 1.4)), (0, (6, 2, 1.5, 2)), (0, (3, 1.5, 1, 1.5, 1, 1.5))]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]


def appearance(number: int) -> dict[str, Any]:
    """Return color, line style and marker of curve `number`, from 0."""
    return {
        "color": PALETTE[number % len(PALETTE)],
        "linestyle": STYLES[number % len(STYLES)],
        "marker": MARKERS[number % len(MARKERS)],
    }


def as_percentages(axes: Axes) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))


def as_counts(axes: Axes) -> None:
    """Format an axis of counts from zero, abbreviated."""
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: compact(value))


def style_axes(axes: Axes, values: str) -> None:
    """Draw grid lines across the value axis (x or y), and no frame."""
    axes.grid(axis=values, color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(AXIS)
    axes.tick_params(labelsize=8.5, colors=INK, color=AXIS)


def add_legend(figure: Figure, handles: dict[str, Any], place: str, columns: int) -> None:
    """Add a legend outside the panels, for artists by label. A dollar sign in a label does not start a formula."""
    look = {"fontsize": 8.5, "frameon": False, "labelcolor": INK, "handlelength": 2.6, "columnspacing": 1.8}
    legend = figure.legend(list(handles.values()), list(handles), loc=f"outside {place}", ncols=columns, **look)
    for text in legend.get_texts():
        text.set_parse_math(False)


def png(figure: Figure) -> bytes:
    """Return the content of a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    target = io.BytesIO()
    FigureCanvasAgg(figure).print_png(target)
    return target.getvalue()


def svg_file(figure: Figure, name: str) -> str:
    """Return the content of an SVG file that looks the same everywhere: its letters are outlines."""
    return _drawn(figure, name, "path")


def svg(figure: Figure, name: str, title: str, description: str) -> str:
    """Return an SVG element for a page: text stays text, colors are variables; `name` makes its ids unique."""
    figure.set_facecolor("none")
    drawn = _drawn(figure, name, "none")
    box = re.search(r'viewBox="([^"]+)"', drawn)[1]
    inner = drawn[drawn.index("</metadata>") + len("</metadata>") : drawn.rindex("</svg>")]
    inner = re.sub(r'<style type="text/css">.*?</style>|<defs>\s*</defs>|<!--.*?-->', "", inner, flags=re.DOTALL)
    inner = re.sub(r'<g id="[^"]*"', "<g", inner)
    about = f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
    inner = with_variables(re.sub(r"\n\s*", "\n", inner))
    return f'<svg viewBox="{box}" role="img">{about}{inner}</svg>'


def _drawn(figure: Figure, name: str, letters: str) -> str:
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    target = io.StringIO()
    with rc_context({"svg.fonttype": letters, "svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_svg(target, metadata={"Date": None})
    return target.getvalue()


def described(figure: Figure) -> str:
    """Return an alternative text: each curve's first, last, minimum and maximum value."""
    return " ".join(filter(None, (_described(axes) for axes in figure.axes if axes.get_ylabel())))


def _described(axes: Axes) -> str:
    from matplotlib.ticker import PercentFormatter

    shares = isinstance(axes.yaxis.get_major_formatter(), PercentFormatter)
    curves: dict[str, list[float]] = {}
    for line in axes.lines:
        label = str(line.get_label()).removeprefix("_")
        # marks of steps have other coordinates; raw values behind a mean have no label
        if line.get_transform() is axes.transData and not label.startswith("child"):
            curves.setdefault(label, []).extend(map(float, line.get_ydata()))
    parts = [f"{label}: {_course(values, shares)}" for label, values in curves.items() if values]
    return f"{axes.get_ylabel()}. {'; '.join(parts)}." if parts else ""


def _course(values: list[float], shares: bool) -> str:
    first, last, least, greatest = (_figure(v, shares) for v in (values[0], values[-1], min(values), max(values)))
    return first if len(values) == 1 else f"from {first} to {last}, between {least} and {greatest}"


def _figure(value: float, share: bool) -> str:
    return f"{value:.1%}" if share else compact(value) if abs(value) >= 1000 else f"{value:.4g}"
