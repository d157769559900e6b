"""The plot of an evaluation: scores by task, and differences from the baseline, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_detour.evaluation.report import tables
from megatron_detour.evaluation.report.tables import Summary, metric_words
from megatron_detour.text import visible
from megatron_detour.ui.colors import AXIS, BAND, INK, PAGE, SOFT
from megatron_detour.ui.figures import add_legend, appearance, style_axes
from megatron_detour.ui.format import counted, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILE = "scores.png"
TITLE = "Scores by task and differences from the baseline"
CAPTION = (
    "Left: the mean over seeds with its 95% interval (Student's t). Right: the difference from the baseline with its "
    "95% interval, over seeds for a task, over tasks in the first row. A filled marker on the right is a clear "
    "difference after Holm's correction: by permutation test and over seeds for a task, over tasks in the first row."
)
WIDTH = 9.2  # inches, like the other plots of a report
LEAST_ROW, MODEL_ROW = 0.36, 0.105  # inches per task, and per model within it
LONGEST_TITLE, LONGEST_MODEL, LONGEST_BASELINE = 30, 60, 26  # characters
LEGEND_WIDTH = 112  # characters in a row of the legend
REACH = 0.75  # how far intervals may extend the axis on either side, relative to the range of the means
LEAST_REACH = 2.0  # points
FULL_SCORE = 101.5  # percent, the end of the axis: scores are at most 100


@dataclass(frozen=True)
class Mark:
    """A mean with its interval, in percent or points. `full` (a filled marker) for scores and clear differences."""

    row: int
    model: int
    mean: float
    interval: tuple[float, float] | None
    full: bool = True


def draw_scores(summary: Summary) -> Figure | None:
    """Draw a row per task, the average in the first row; None without scores."""
    from matplotlib.figure import Figure

    rows = _rows(summary)
    if not rows:
        return None
    models = summary["models"]
    height = max(LEAST_ROW, 0.12 + MODEL_ROW * len(models))
    figure = Figure((WIDTH, 1.15 + height * len(rows)), dpi=150, layout="constrained", facecolor=PAGE)
    figure.get_layout_engine().set(h_pad=0.06, w_pad=0.06, wspace=0.02)
    differences = _differences(summary)
    panels = figure.subplots(1, 2 if differences else 1, sharey=True, squeeze=False)[0]
    baseline = shortened(models[0], LONGEST_BASELINE)
    _panel(panels[0], rows, _scores(summary), len(models), "score on the test split (%)")
    if differences:
        _panel(panels[1], rows, differences, len(models), f"difference from {baseline} (points)", zero=True)
    for axes, title in zip(panels, ("Scores", "Differences"), strict=False):
        axes.set_title(title, loc="left", fontsize=12.5, fontweight="bold", color=INK, pad=8)
    if differences:
        panels[1].set_title("filled: clear difference", loc="right", fontsize=8.2, color=SOFT, pad=8)
    _name_rows(panels[0], rows)
    _legend(figure, models, differences=bool(differences))
    return figure


def describe(summary: Summary) -> str:
    """Return the plot's figures as text, as its alternative text."""
    models, rows = summary["models"], _rows(summary)
    scores = [
        f"{rows[mark.row][0]}, {models[mark.model]}: {tables.percent(mark.mean / 100)}%"
        for mark in sorted(_scores(summary), key=lambda mark: (mark.row, mark.model))
    ]
    differing = [
        f"{rows[mark.row][0]}, {models[mark.model]}: {tables.points(mark.mean / 100)} points"
        + (f" ({mark.interval[0]:.1f} to {mark.interval[1]:.1f})" if mark.interval else "")
        for mark in _differences(summary)
    ]
    against = f" Differences from {models[0]}: {'; '.join(differing)}." if differing else ""
    return visible(f"Scores: {'; '.join(scores)}.{against}")


def _rows(summary: Summary) -> list[tuple[str, str]]:
    """Return the title and metric of each row."""
    tasks = [(task["name"], metric_words(task["metric"])) for task in summary["tasks"] if task["scores"]]
    average = summary["average"]
    return [(f"Mean of {counted(len(average['tasks']), 'task')}", "")] * bool(average["scores"]) + tasks


def _scores(summary: Summary) -> list[Mark]:
    groups = [summary["average"]["scores"]] if summary["average"]["scores"] else []
    groups += [task["scores"] for task in summary["tasks"] if task["scores"]]
    return [
        Mark(row, number, 100 * figures["mean"], _percent(figures["interval"]))
        for row, scores in enumerate(groups)
        for number, figures in ((n, scores[m]) for n, m in enumerate(summary["models"]) if m in scores)
    ]


def _differences(summary: Summary) -> list[Mark]:
    first, models = int(bool(summary["average"]["scores"])), summary["models"]
    marks = []
    for figures in summary["against_baseline"]:
        if figures["cells"] and first:
            tasks = figures["by_tasks"]
            interval = None if tasks["low"] is None else (tasks["low"], tasks["high"])
            marks.append(
                Mark(0, models.index(figures["model"]), 100 * tasks["mean"], _percent(interval), tasks["clear"])
            )
    for row, task in enumerate((task for task in summary["tasks"] if task["scores"]), start=first):
        for model, figures in task["differences"].items():
            mark = Mark(
                row, models.index(model), 100 * figures["mean"], _percent(figures["interval"]), figures["clear"]
            )
            marks.append(mark)
    return marks


def _percent(interval: Sequence[float] | None) -> tuple[float, float] | None:
    return (100 * interval[0], 100 * interval[1]) if interval else None


def _panel(axes: Axes, rows: list[Any], marks: list[Mark], models: int, label: str, *, zero: bool = False) -> None:
    low, high = _limits(marks, zero)
    for row in range(0, len(rows), 2):
        axes.axhspan(row - 0.5, row + 0.5, facecolor=BAND, linewidth=0, zorder=0)
    if rows[0][1] == "" and len(rows) > 1:
        axes.axhline(0.5, color=AXIS, linewidth=1.0)
    if zero:
        axes.axvline(0, color=INK, linewidth=1.0, zorder=1)
    for mark in marks:
        _draw(axes, mark, models)
    axes.set(xlim=(low, high), ylim=(len(rows) - 0.5, -0.5))
    axes.set_xlabel(label, color=INK, fontsize=9.5, parse_math=False)
    style_axes(axes, "x")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", left=False)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:+g}".replace("-", "−") if zero and value else f"{value:g}")
    beyond = sum(bool(m.interval and (m.interval[0] < low or m.interval[1] > high)) for m in marks)
    if beyond:
        text = f"{counted(beyond, 'interval')} reach{'es' if beyond == 1 else ''} beyond the range shown"
        place = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "right", "va": "top"}
        axes.annotate(text, (1, 0), (0, -33), fontsize=8, color=SOFT, **place)


def _draw(axes: Axes, mark: Mark, models: int) -> None:
    look = appearance(mark.model)
    # the models of a row are stacked within four fifths of its height
    y = mark.row + 0.8 * ((mark.model + 0.5) / models - 0.5)
    if mark.interval:
        axes.plot(mark.interval, (y, y), color=look["color"], linewidth=1.3, solid_capstyle="butt", zorder=2)
    face = look["color"] if mark.full else PAGE
    style = {"marker": look["marker"], "markersize": 4.6, "markeredgewidth": 1.1, "linestyle": "none", "zorder": 3}
    axes.plot([mark.mean], [y], markerfacecolor=face, markeredgecolor=look["color"], **style)


def _limits(marks: list[Mark], zero: bool) -> tuple[float, float]:
    """Return axis limits that show the means, and the intervals unless they are far wider (as with two seeds)."""
    means = [mark.mean for mark in marks] + [0.0] * zero
    ends = [end for mark in marks for end in mark.interval or ()]
    reach = max(REACH * (max(means) - min(means)), LEAST_REACH)
    low = max(min([*means, *ends]), min(means) - reach)
    high = min(max([*means, *ends]), max(means) + reach)
    margin = 0.04 * (high - low) or 1.0
    return (low - margin, high + margin) if zero else (low - margin, min(high + margin, FULL_SCORE))


def _name_rows(axes: Axes, rows: list[tuple[str, str]]) -> None:
    names = [f"{shortened(title, LONGEST_TITLE)}\n{metric}".strip() for title, metric in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8.2, color=INK, linespacing=1.25)
    for number, text in enumerate(axes.get_yticklabels()):
        text.set_parse_math(False)
        if not rows[number][1]:
            text.set_fontweight("bold")


def _legend(figure: Figure, models: list[str], *, differences: bool) -> None:
    from matplotlib.lines import Line2D

    handles = {}
    for number, model in enumerate(models):
        look = appearance(number)
        line = Line2D([], [], color=look["color"], marker=look["marker"], markersize=5, linewidth=1.3)
        handles[f"{shortened(model, LONGEST_MODEL)}{' (baseline)' * (differences and not number)}"] = line
    columns = max(1, min(len(handles), LEGEND_WIDTH // (max(map(len, handles)) + 9)))
    rows = -(-len(handles) // columns)
    figure.set_figheight(figure.get_figheight() + 0.19 * (rows - 1))
    add_legend(figure, handles, "upper left", columns)
