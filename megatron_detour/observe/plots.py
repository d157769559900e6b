"""The plots of a run's report, drawn by matplotlib: losses, learning rate, validation and throughput."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_detour.observe.run_folder import VALIDATION_FIGURES, Run, compact, objective_words, points, stretches
from megatron_detour.observe.sinks import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

COLOURS = {"mlm": "#2563c9", "clm": "#c8540a"}
INK = "#1f2933"
GREY = "#66707c"
STRIP = 0.44  # inches that the names of the phases take
SWITCH = "objective switch"
RESUMED = "resumed from a checkpoint"
LONGEST_CURVE = 4000  # points; more than a plot this wide can show


@dataclass(frozen=True)
class Plot:
    """A plot of the page: its file below plots/, its caption, and how it is drawn."""

    file: str
    title: str
    caption: str
    draw: Callable[[Run], Figure | None]


def _smoothed(values: list[float]) -> list[float]:
    """A centred mean: unlike a trailing one it does not shift the curve at the start of a phase."""
    import numpy

    half = max(1, len(values) // 60)
    total = numpy.concatenate([[0.0], numpy.cumsum(values)])
    centre = numpy.arange(len(values))
    # Where a phase starts the curve is steep, so the window shrinks on both sides; where it ends noise matters more.
    before = numpy.minimum(half, centre)
    after = numpy.minimum(before, len(values) - 1 - centre)
    return list((total[centre + after + 1] - total[centre - before]) / (before + after + 1))


def _draw_loss(run: Run) -> Figure | None:
    if not _has(run.records, "loss"):
        return None
    frame = _Frame(run, "Training loss", ["loss (nats per labelled token)"])
    axes = frame.panels[0]
    above = _curves(axes, run, "loss", {"mlm": "MLM loss", "clm": "CLM loss"})
    _note(axes, above)
    return frame.finish()


def _draw_learning_rate(run: Run) -> Figure | None:
    if not _has(run.records, "lr"):
        return None
    frame = _Frame(run, "Learning rate", ["learning rate"], height=2.9)
    axes = frame.panels[0]
    for objective, records in stretches(run):
        x, y = points(run, records, "lr")
        axes.plot(x, y, color=_colour(objective), linewidth=1.8, **_dot(x), label=objective.upper())
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4), useMathText=True)
    return frame.finish()


def _draw_throughput(run: Run) -> Figure | None:
    if not _has(run.records, "tokens_per_second"):
        return None
    frame = _Frame(run, "Throughput", ["tokens per second"], height=2.9)
    axes = frame.panels[0]
    above = _curves(axes, run, "tokens_per_second", {"mlm": "MLM", "clm": "CLM"})
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: compact(value))
    _note(axes, above)
    return frame.finish()


def _draw_validation(run: Run) -> Figure | None:
    losses = [key for key in ("val_mlm_loss", "val_clm_loss") if _has(run.validations, key)]
    accuracy = _has(run.validations, "val_mlm_accuracy")
    if not losses and not accuracy:
        return None
    labels = (["loss (nats per token)"] if losses else []) + (["MLM accuracy"] if accuracy else [])
    frame = _Frame(run, "Validation", labels, height=3.4 if len(labels) == 1 else 5.2)
    for key in losses:
        _markers(frame.panels[0], run, key)
    unigram = run.environment.get("unigram_loss")
    if losses and unigram is not None:
        label = "unigram distribution of the corpus"
        frame.panels[0].axhline(unigram, color=GREY, linestyle=":", linewidth=1.6, label=label)
    if accuracy:
        from matplotlib.ticker import PercentFormatter

        _markers(frame.panels[-1], run, "val_mlm_accuracy")
        frame.panels[-1].yaxis.set_major_formatter(PercentFormatter(xmax=1))
    for axes in frame.panels:
        axes.margins(y=0.14)
    return frame.finish()


def _markers(axes: Axes, run: Run, key: str) -> None:
    marker, colour = ("s", COLOURS["clm"]) if "clm" in key else ("o", COLOURS["mlm"])
    x, y = points(run, run.validations, key)
    # Short runs show each point; among hundreds the markers would hide the line.
    every = max(1, len(x) // 40)
    # The accuracy has a panel of its own, whose axis names it.
    label = "_accuracy" if key.endswith("accuracy") else f"{VALIDATION_FIGURES[key]}, held-out text"
    axes.plot(
        x, y, color=colour, marker=marker, markersize=5, markevery=every, linewidth=1.6, label=label, clip_on=False
    )


def _curves(axes: Axes, run: Run, key: str, labels: dict[str, str]) -> int:
    """Draws each phase faintly and smoothed; returns how many values lie outside the range of the y axis."""
    values: list[float] = []
    bounds: list[float] = []
    for objective, records in stretches(run):
        x, y = points(run, records, key)
        if not y:
            continue
        colour, smooth = _colour(objective), _smoothed(y)
        if len(y) > 2:
            axes.plot(*_thinned(x, y), color=colour, alpha=0.28, linewidth=0.9)
        axes.plot(
            *_thinned(x, smooth), color=colour, linewidth=1.9, **_dot(x), label=labels.get(objective, objective.upper())
        )
        values += y
        bounds += _usual_range(y)
    low, high = min(bounds), max(bounds)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)
    return sum(value > high + margin for value in values)


def _usual_range(values: list[float]) -> tuple[float, float]:
    """The range of a phase without its first steps and single peaks where they stand far above the others."""
    import numpy

    width = max(9, len(values) // 100)
    if len(values) < 2 * width:
        return min(values), max(values)
    windows = numpy.lib.stride_tricks.sliding_window_view(values, width)
    low, high = min(values), float(numpy.median(windows, axis=1).max())
    limit = high + 0.3 * (high - low)
    return low, max(value for value in values if value <= limit)


def _note(axes: Axes, above: int) -> None:
    if above:
        text = f"{above} step{'s' if above > 1 else ''} above the range shown"
        axes.annotate(
            text, (1, 0), (0, -22), "axes fraction", "offset points", ha="right", va="top", fontsize=8, color=GREY
        )


def _has(records: list[Record], key: str) -> bool:
    return any(record.get(key) is not None for record in records)


def _thinned(x: list[float], y: list[float]) -> tuple[list[float], list[float]]:
    every = max(1, -(-len(x) // LONGEST_CURVE))
    return x[::every], y[::every]


def _dot(x: list[float]) -> dict[str, Any]:
    """A line through a point or two is invisible or nearly so: mark them."""
    return {"marker": "o", "markersize": 4, "clip_on": False} if len(x) <= 2 else {}


def _colour(objective: str) -> str:
    return COLOURS.get(objective, GREY)


class _Frame:
    """A figure over the tokens trained: a strip that names the phases, and below it panels that share its x axis."""

    def __init__(self, run: Run, title: str, labels: list[str], *, height: float = 3.6) -> None:
        from matplotlib.figure import Figure

        self.run = run
        self.figure = Figure(figsize=(9.2, height + 0.7), dpi=150, layout="constrained", facecolor="white")
        self.figure.get_layout_engine().set(hspace=0.0, h_pad=0.03, w_pad=0.06)
        grid = self.figure.add_gridspec(len(labels) + 1, 1, height_ratios=[STRIP, *_shares(labels, height)])
        self.strip = self.figure.add_subplot(grid[0])
        self.panels = [self.figure.add_subplot(grid[row + 1], sharex=self.strip) for row in range(len(labels))]
        self.strip.set_title(title, loc="left", fontsize=12.5, fontweight="bold", color=INK, pad=7)
        self.strip.set(yticks=[], ylim=(0, 1))
        self.strip.tick_params(axis="x", bottom=False, labelbottom=False)
        for axes, label in zip(self.panels, labels, strict=True):
            self._style(axes, label, last=axes is self.panels[-1])
        self.strip.spines[:].set_visible(False)
        self._bands()

    def _style(self, axes: Axes, label: str, *, last: bool) -> None:
        axes.set_ylabel(label, color=INK, fontsize=9.5)
        axes.grid(axis="y", color="#d5dae0", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#9aa4af")
        axes.tick_params(labelsize=8.5, colors=INK, labelbottom=last, color="#9aa4af")
        if last:
            axes.set_xlabel("tokens trained", color=INK, fontsize=9.5)
            axes.xaxis.set_major_formatter(lambda value, _: compact(value))

    def _bands(self) -> None:
        previous = None
        edge = max(self.run.done_tokens, 1)
        self.strip.set_xlim(0, edge)
        for phase in self.run.started_phases:
            start, end = phase["start_tokens"], min(phase["end_tokens"], edge)
            colour = _colour(phase["objective"])
            self.strip.axvspan(start, end, facecolor=colour, alpha=0.2, linewidth=0)
            for axes in self.panels:
                axes.axvspan(start, end, facecolor=colour, alpha=0.055, linewidth=0)
            self._boundary(previous, phase)
            previous = phase

    def _boundary(self, previous: dict[str, Any] | None, phase: dict[str, Any]) -> None:
        if previous is None:
            return
        self.strip.axvline(phase["start_tokens"], color="white", linewidth=1.6)
        for axes in self.panels:
            if previous["objective"] == phase["objective"]:
                axes.axvline(phase["start_tokens"], color="white", linewidth=2.2, zorder=0.9)
            else:
                axes.axvline(phase["start_tokens"], color=INK, linestyle=(0, (5, 3)), linewidth=1.1, label=SWITCH)

    def finish(self) -> Figure:
        """Adds the resumptions, the legend and, once the widths are known, the names of the phases."""
        for step in self.run.resumptions:
            for axes in self.panels:
                x = self.run.tokens_at(step)
                axes.axvline(x, ymax=0.07, color=INK, linewidth=1.4, label=RESUMED)
        handles: dict[str, Any] = {}
        for axes in self.panels:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        self._legend(handles)
        self.figure.draw_without_rendering()
        self._name_phases()
        return self.figure

    def _legend(self, handles: dict[str, Any]) -> None:
        from matplotlib.lines import Line2D

        if RESUMED in handles:
            handles[RESUMED] = Line2D(
                [], [], color=INK, marker="|", markersize=8, markeredgewidth=1.4, linestyle="none"
            )
        for last in (SWITCH, RESUMED):
            if last in handles:
                handles[last] = handles.pop(last)
        if handles:
            self.figure.legend(
                list(handles.values()),
                list(handles),
                loc="outside lower center",
                ncols=len(handles) if len(handles) <= 4 else 3,
                fontsize=8.5,
                frameon=False,
                labelcolor=INK,
                handlelength=2.2,
                columnspacing=1.8,
            )

    def _name_phases(self) -> None:
        """Writes in each band the longest of its labels that fits, or its number, which the title's row explains."""
        edge = max(self.run.done_tokens, 1)
        width = self.strip.get_window_extent().width
        numbered = []
        for number, phase in enumerate(self.run.started_phases, start=1):
            start, end = phase["start_tokens"], min(phase["end_tokens"], edge)
            room = width * (end - start) / edge - 8
            # a dollar sign in a name is no formula
            label = self.strip.text((start + end) / 2, 0.5, "", fontsize=8.2, color=INK, parse_math=False)
            label.set(ha="center", va="center_baseline", linespacing=1.2)
            if not self._fit(label, _phase_labels(phase), room):
                numbered.append(f"{number} {phase['name']}")
                self._fit(label, [str(number)], room + 4)
        if numbered:
            self._explain(numbered, width)

    def _fit(self, label: Text, texts: list[str], room: float) -> bool:
        """Sets the first of `texts` no wider than `room` pixels; empties the label where none is."""
        for text in texts:
            label.set_text(text)
            if label.get_window_extent().width <= room:
                return True
        label.set_text("")
        return False

    def _explain(self, numbered: list[str], width: float) -> None:
        key = self.strip.set_title("", loc="right", fontsize=8.2, color=GREY, pad=7, parse_math=False)
        self._fit(key, [",  ".join(numbered), "numbers: the phases in the order of the plan"], 0.7 * width)


def _phase_labels(phase: dict[str, Any]) -> list[str]:
    name, objective = str(phase["name"]), objective_words(phase)
    return [f"{name}: {objective}", f"{name}\n{objective}", f"{name}\n{phase['objective'].upper()}", name]


def _shares(labels: list[str], height: float) -> list[float]:
    room = height - STRIP
    return [room] if len(labels) == 1 else [room * 0.62, room * 0.38]


def png(figure: Figure) -> bytes:
    """Returns the figure as the content of a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    target = io.BytesIO()
    FigureCanvasAgg(figure).print_png(target)
    return target.getvalue()


PLOTS: list[Plot] = [
    Plot(
        "validation.png",
        "Validation",
        "Both objectives are measured on held-out text in either kind of phase. MLM and CLM losses are different "
        "quantities: compare each only with itself.",
        _draw_validation,
    ),
    Plot(
        "loss.png",
        "Training loss",
        "Each step faintly, and a centred mean per phase. The objective sets the colour; the two losses are "
        "different quantities.",
        _draw_loss,
    ),
    Plot("learning_rate.png", "Learning rate", "The rate that each step used.", _draw_learning_rate),
    Plot(
        "throughput.png",
        "Throughput",
        "Tokens per second of each step over all devices, padding included.",
        _draw_throughput,
    ),
]
