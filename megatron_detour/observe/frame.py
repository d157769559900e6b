"""A figure over trained tokens: strips that name the phases, and panels of curves below them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_detour.objectives import read_objective
from megatron_detour.observe.run_folder import Run
from megatron_detour.text import visible
from megatron_detour.ui.colors import AXIS, COLORS, INK, PAGE, SOFT
from megatron_detour.ui.figures import add_legend, style_axes
from megatron_detour.ui.format import compact, counted, frozen_words, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

STRIP = 0.44  # inches, height of a strip of phase names
SWITCH = "objective switch"
RESUMED = "resumed from a checkpoint"
FROZEN = "some parameters frozen"
BUCKETS = 900  # for curves with more points: the minimum and maximum of each are drawn
LONGEST_LABEL = 90  # characters of a legend entry
LEGEND_WIDTH = 118  # characters per legend row
LEGEND_ROW = 0.175  # inches


@dataclass(frozen=True)
class Curve:
    """Values over tokens. Curves with the same label share a legend entry.

    Measurements per step are smoothed; a schedule (`exact`) and points with a `marker` are drawn unchanged.
    """

    x: np.ndarray
    y: np.ndarray
    color: str
    label: str
    linestyle: Any = "-"
    marker: str = ""
    faint: bool = True  # draw the raw values behind the mean
    exact: bool = False


class Frame:
    """A figure of one or several runs; each run has a strip, unless all have the same phases.

    The phases of a single run tint the panels; with several runs, lines mark the ends of phases. `colors` are the runs'
    colors, `height` the inches of the panels and a strip. Draw into `panels`, then call `finish`.
    """

    def __init__(
        self,
        runs: list[Run],
        title: str,
        labels: list[str],
        *,
        height: float = 3.6,
        colors: list[str] | None = None,
    ) -> None:
        from matplotlib.figure import Figure

        self.runs = runs
        self.edge = max(1, *(run.done_tokens for run in runs))
        self._shown: list[tuple[Axes, list[Curve]]] = []
        shown = _with_own_phases(runs)
        size = (9.2, height + STRIP * len(shown) + 0.26)
        self.figure = Figure(figsize=size, dpi=150, layout="constrained", facecolor=PAGE)
        self.figure.get_layout_engine().set(hspace=0.0, h_pad=0.03, w_pad=0.06)
        rows = self._rows([STRIP] * len(shown) + _shares(len(labels), height - STRIP))
        self.strips, self.panels = dict(zip(shown, rows, strict=False)), rows[len(shown) :]
        rows[0].set_title(title, loc="left", fontsize=12.5, fontweight="bold", color=INK, pad=7)
        rows[0].set_xlim(0, self.edge)
        for axes, label in zip(self.panels, labels, strict=True):
            self._style(axes, label, last=axes is self.panels[-1])
        for number, axes in self.strips.items():
            self._style_strip(axes, str(number + 1) if len(shown) > 1 else "", (colors or [INK] * len(runs))[number])
            self._bands(runs[number], axes)

    def _rows(self, heights: list[float]) -> list[Axes]:
        """Return stacked axes that share the x axis."""
        grid = self.figure.add_gridspec(len(heights), 1, height_ratios=heights)
        first = self.figure.add_subplot(grid[0])
        return [first] + [self.figure.add_subplot(grid[row], sharex=first) for row in range(1, len(heights))]

    def _style(self, axes: Axes, label: str, *, last: bool) -> None:
        axes.set_ylabel(label, color=INK, fontsize=9.5)
        style_axes(axes, "y")
        axes.tick_params(labelbottom=last)
        if last:
            axes.set_xlabel("tokens trained", color=INK, fontsize=9.5)
            axes.xaxis.set_major_formatter(lambda value, _: compact(value))

    def _style_strip(self, axes: Axes, label: str, color: str) -> None:
        axes.set(ylim=(0, 1), yticks=[0.5] if label else [], yticklabels=[label] if label else [])
        axes.tick_params(axis="x", bottom=False, labelbottom=False)
        axes.tick_params(axis="y", left=False, labelsize=9.5, labelcolor=color)
        for text in axes.get_yticklabels():
            text.set_fontweight("bold")
        axes.spines[:].set_visible(False)

    def _bands(self, run: Run, strip: Axes) -> None:
        previous = None
        for phase in run.started_phases:
            start, end = phase["start_tokens"], self._end(run, phase)
            color = objective_color(phase["objective"])
            strip.axvspan(start, end, ymin=0.06, ymax=0.94, facecolor=color, alpha=0.2, linewidth=0)
            if frozen_words(phase):
                strip.axvspan(start, end, 0.06, 0.17, facecolor="none", edgecolor=color, hatch="/////", linewidth=0)
                _entry(strip, FROZEN)
            if len(self.runs) == 1:
                for axes in self.panels:
                    axes.axvspan(start, end, facecolor=color, alpha=0.055, linewidth=0)
            if previous is not None:
                strip.axvline(start, color=PAGE, linewidth=1.6)
                self._boundary(previous, phase)
            previous = phase

    def _boundary(self, previous: dict[str, Any], phase: dict[str, Any]) -> None:
        for axes in self.panels:
            if len(self.runs) > 1:
                axes.axvline(phase["start_tokens"], color=AXIS, linewidth=1.0, zorder=0.9)
            elif previous["objective"] == phase["objective"]:
                axes.axvline(phase["start_tokens"], color=PAGE, linewidth=2.2, zorder=0.9)
            else:
                axes.axvline(phase["start_tokens"], color=INK, linestyle=(0, (5, 3)), linewidth=1.1, label=SWITCH)

    def _end(self, run: Run, phase: dict[str, Any]) -> float:
        return min(phase["end_tokens"], max(run.done_tokens, 1))

    def curves(self, axes: Axes, curves: list[Curve], *, from_zero: bool = False) -> None:
        """Draw the curves; isolated peaks of measurements do not determine the range of the y axis."""
        bounds: list[float] = []
        for curve in curves:
            if curve.marker:
                self._points(axes, curve)
            elif curve.exact:
                axes.plot(*thinned(curve.x, curve.y), label=curve.label, **_look(curve, linewidth=1.8))
            else:
                self._measured(axes, curve)
                bounds += _usual_range(curve.y, 0.0 if from_zero else float(curve.y.min()))
        if bounds:
            low, high = min(bounds), max(bounds)
            margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
            axes.set_ylim(0 if from_zero else low - margin, high + margin)
            self._shown.append((axes, curves))
        elif any(curve.exact for curve in curves):
            axes.set_ylim(bottom=0)
        else:
            axes.margins(y=0.14)

    def _points(self, axes: Axes, curve: Curve) -> None:
        """Draw a line with markers, unless there are so many that they would hide the line."""
        look = {"color": curve.color, "linestyle": curve.linestyle, "marker": curve.marker, "linewidth": 1.6}
        every = max(1, len(curve.x) // 40)
        x, y = thinned(curve.x, curve.y)
        axes.plot(x, y, markersize=5, markevery=every, label=curve.label, clip_on=False, **look)

    def _measured(self, axes: Axes, curve: Curve) -> None:
        if curve.faint and len(curve.y) > 2:
            axes.plot(*thinned(curve.x, curve.y), color=curve.color, alpha=0.28, linewidth=0.9)
        axes.plot(*thinned(curve.x, smoothed(curve.y)), label=curve.label, **_look(curve, linewidth=1.9))

    def finish(self) -> Figure:
        """Add the resumptions, the legend and, once the widths are known, the names of the phases."""
        if len(self.runs) == 1:
            for step in self.runs[0].resumptions:
                x = self.runs[0].tokens_at(step)
                for axes in self.panels:
                    axes.axvline(x, ymax=0.07, color=INK, linewidth=1.4, label=RESUMED)
        self._note()
        handles: dict[str, Any] = {}
        for axes in [*self.panels, *self.strips.values()]:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        self._legend(handles)
        self.figure.draw_without_rendering()
        self.figure.set_layout_engine("none")  # keep the layout: computing it again takes longer than drawing
        self._name_phases()
        return self.figure

    def _note(self) -> None:
        above = sum(int((curve.y > axes.get_ylim()[1]).sum()) for axes, curves in self._shown for curve in curves)
        if not above:
            return
        text = f"{counted(above, 'value')} above the range shown"
        place = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "right", "va": "top"}
        self.panels[-1].annotate(text, (1, 0), (0, -22), fontsize=8, color=SOFT, **place)

    def _legend(self, handles: dict[str, Any]) -> None:
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

        if RESUMED in handles:
            mark = {"marker": "|", "markersize": 8, "markeredgewidth": 1.4, "linestyle": "none"}
            handles[RESUMED] = Line2D([], [], color=INK, **mark)
        if FROZEN in handles:
            handles[FROZEN] = Patch(facecolor="none", edgecolor=SOFT, hatch="/////", linewidth=0)
        for last in (SWITCH, RESUMED, FROZEN):
            if last in handles:
                handles[last] = handles.pop(last)
        if handles:
            labels = [shortened(label, LONGEST_LABEL) for label in handles]
            columns = _columns(labels)
            further = max(0, -(-len(labels) // columns) - 2)
            # a legend with many rows extends the figure instead of shrinking the panels
            self.figure.set_figheight(self.figure.get_figheight() + further * LEGEND_ROW)
            shown = dict(zip(labels, handles.values(), strict=True))
            add_legend(self.figure, shown, "lower center", columns)

    def _name_phases(self) -> None:
        """Write in each band the longest of its labels that fits, or its number, which the title row explains."""
        numbered = []
        for run_number, strip in self.strips.items():
            run, width = self.runs[run_number], strip.get_window_extent().width
            for number, phase in enumerate(run.started_phases, start=1):
                start, end = phase["start_tokens"], self._end(run, phase)
                room = width * (end - start) / self.edge - 8
                # a dollar sign in a name does not start a formula
                middle = 0.57 if phase.get("freeze") else 0.5  # above the hatching
                label = strip.text((start + end) / 2, middle, "", fontsize=8.2, color=INK, parse_math=False)
                label.set(ha="center", va="center_baseline", linespacing=1.2)
                if not _fit(label, _phase_labels(phase), room):
                    numbered.append(f"{number} {visible(phase['name'])}")
                    _fit(label, [str(number)], room + 4)
        if numbered:
            first = next(iter(self.strips.values()))
            key = first.set_title("", loc="right", fontsize=8.2, color=SOFT, pad=7, parse_math=False)
            texts = ["numbers in the strip: phases in the order of the plan"]
            # the numbers of several runs may mean different phases
            if len(self.strips) == 1:
                texts.insert(0, ",  ".join(numbered))
            _fit(key, texts, 0.62 * first.get_window_extent().width)


def objective_color(objective: str) -> str:
    return COLORS.get(objective, SOFT)


def objective_label(objective: str) -> str:
    return read_objective({"objective": objective}).label


def _look(curve: Curve, linewidth: float) -> dict[str, Any]:
    """Return a marker for curves of one or two points, whose line is hardly visible."""
    mark = {"marker": "o", "markersize": 4, "clip_on": False} if len(curve.x) <= 2 else {}
    return {"color": curve.color, "linestyle": curve.linestyle, "linewidth": linewidth, **mark}


def smoothed(values: np.ndarray) -> np.ndarray:
    """Return a centered mean, which unlike a trailing mean does not shift the curve at the start of a phase."""
    half = max(1, len(values) // 60)
    total = np.append(0.0, np.cumsum(values))
    center = np.arange(len(values))
    # At the start of a phase the curve is steep, so the window shrinks on both sides; at its end noise matters more.
    before = np.minimum(half, center)
    after = np.minimum(before, len(values) - 1 - center)
    return (total[center + after + 1] - total[center - before]) / (before + after + 1)


def _usual_range(values: np.ndarray, low: float) -> tuple[float, float]:
    """Return the range of a phase from `low`, without its first steps and isolated peaks."""
    width = max(9, len(values) // 100)
    if len(values) < 2 * width:
        return low, float(values.max())
    # All windows of a long curve would need length^2 / 100 memory: a few hundred of them suffice.
    windows = np.lib.stride_tricks.sliding_window_view(values, width)[:: max(1, width // 9)]
    high = float(np.median(windows, axis=1).max())
    limit = high + 0.3 * (high - low)
    return low, float(values[values <= limit].max())


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends, and the minimum and maximum of each of BUCKETS intervals: what a plot of this width can show."""
    width = -(-len(y) // BUCKETS)
    if width < 3:
        return x, y
    filled = np.append(y, np.full(-len(y) % width, y[-1])).reshape(-1, width)
    first = width * np.arange(len(filled))
    rows = np.concatenate([[0, len(y) - 1], first + filled.argmin(1), first + filled.argmax(1)])
    rows = np.unique(np.minimum(rows, len(y) - 1))
    return x[rows], y[rows]


def _fit(label: Text, texts: list[str], room: float) -> bool:
    """Set the first of `texts` that is at most `room` pixels wide, or an empty label."""
    for text in texts:
        label.set_text(text)
        if label.get_window_extent().width <= room:
            return True
    label.set_text("")
    return False


def _phase_labels(phase: dict[str, Any]) -> list[str]:
    own = read_objective(phase)
    words = (phase["name"], own.label, own.describe(), frozen_words(phase))
    name, label, objective, frozen = (visible(text) for text in words)
    short = [f"{name}: {objective}", f"{name}\n{objective}", f"{name}\n{label}", name]
    return (
        [f"{name}: {objective}, {frozen} frozen", f"{name}: {objective}\n{frozen} frozen", *short] if frozen else short
    )


def _entry(axes: Axes, label: str) -> None:
    """Add a legend entry that has no artist in the plot."""
    axes.plot([], [], label=label)


def _with_own_phases(runs: list[Run]) -> list[int]:
    """Return the indices of the runs that get a strip: all, or only the longest if they share their phases."""
    keys = ("name", "freeze", "start_tokens", "end_tokens")
    phases = [
        [(read_objective(phase).describe(), [phase.get(key) for key in keys]) for phase in run.phases] for run in runs
    ]
    if all(own == phases[0] for own in phases):
        return [max(range(len(runs)), key=lambda number: runs[number].done_tokens)]
    return list(range(len(runs)))


def _columns(labels: list[str]) -> int:
    widest = max(len(label) for label in labels) + 8  # including its line
    if sum(len(label) + 8 for label in labels) <= LEGEND_WIDTH:
        return len(labels)
    return max(1, min(4, len(labels), LEGEND_WIDTH // widest))


def _shares(panels: int, room: float) -> list[float]:
    """Return the panels' heights; the first is the largest."""
    weights = [1.6] + [1.0] * (panels - 1)
    return [room * weight / sum(weights) for weight in weights]
