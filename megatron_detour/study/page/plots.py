"""The plots of a study's page, each with its data as the rows of a CSV file. An arm has the same color in all."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_detour.evaluation.report.statistics import Spread
from megatron_detour.study.data import StudyData, decay_sweeps, last_tokens, regions
from megatron_detour.study.records import LOSS
from megatron_detour.text import visible
from megatron_detour.ui.colors import AXIS, INK, PAGE, SOFT
from megatron_detour.ui.figures import add_legend, appearance, style_axes
from megatron_detour.ui.format import compact, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 9.2  # inches, like the plots of other pages
LONGEST_ARM, LEGEND_WIDTH = 34, 112  # characters
Cell = str | int | float


@dataclass(frozen=True)
class Plot:
    """A drawn plot: file name without suffix, texts, figure, and the rows of its CSV file with their headers."""

    file: str
    title: str
    caption: str
    figure: Figure
    headers: tuple[str, ...]
    rows: list[tuple[Cell, ...]]

    def csv(self) -> str:
        target = io.StringIO()
        writer = csv.writer(target, lineterminator="\n")
        writer.writerows([self.headers, *self.rows])
        return target.getvalue()


def new_figure(
    title: str, height: float, panels: int = 1, pad: float = 8, **options: Any
) -> tuple[Figure, Sequence[Axes]]:
    """Return a figure with stacked panels; `title` is `pad` points above the first."""
    from matplotlib.figure import Figure

    figure = Figure((WIDTH, height), dpi=150, layout="constrained", facecolor=PAGE)
    figure.get_layout_engine().set(h_pad=0.06, w_pad=0.06)
    axes = figure.subplots(panels, 1, squeeze=False, **options)[:, 0]
    axes[0].set_title(title, loc="left", fontsize=12.5, fontweight="bold", color=INK, pad=pad)
    return figure, axes


def look_of(data: StudyData, arm: str) -> dict[str, Any]:
    """Return color, line style and marker of an arm."""
    return appearance(list(data.arms).index(arm))


def label_axes(axes: Axes, x: str = "", y: str = "") -> None:
    axes.set_xlabel(x, color=INK, fontsize=9.5, parse_math=False)
    axes.set_ylabel(y, color=INK, fontsize=9.5, parse_math=False)


def finish(figure: Figure, panels: Iterable[Axes]) -> Figure:
    """Add a legend of all labeled artists below the panels."""
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(shortened(label, LONGEST_ARM), handle)
    if handles:
        columns = max(1, min(len(handles), LEGEND_WIDTH // (max(map(len, handles)) + 9)))
        rows = -(-len(handles) // columns)
        figure.set_figheight(figure.get_figheight() + 0.19 * rows)
        add_legend(figure, handles, "lower center", columns)
    return figure


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [shortened(name, LONGEST_ARM) for name in names], fontsize=8.5, color=INK)
    axes.set_ylim(len(names) - 0.5, -0.5)
    for text in axes.get_yticklabels():
        text.set_parse_math(False)


def draw_differences(data: StudyData) -> Plot | None:
    """Draw the difference of each arm from the control: the mean of tasks with its interval, and single tasks."""
    found = {arm: mean for arm in data.arms if (mean := data.difference(arm))}
    if not found:
        return None
    title = f"Difference from {shortened(data.control or '', LONGEST_ARM)}"
    figure, (axes,) = new_figure(title, 1.15 + 0.34 * len(found))
    rows: list[tuple[Cell, ...]] = []
    axes.axvline(0, color=INK, linewidth=1.0)
    for row, (arm, mean) in enumerate(found.items()):
        look = look_of(data, arm)
        single = {task: each.mean for n, task in enumerate(data.tasks) if (each := data.difference(arm, n))}
        label = "single tasks" if not row else None
        dots = {"marker": "o", "markersize": 3.4, "linestyle": "none", "alpha": 0.6, "color": SOFT, "label": label}
        axes.plot([100 * value for value in single.values()], [row + 0.22] * len(single), **dots)
        known = mean.low is not None
        interval = (100 * mean.low, 100 * mean.high) if known else ("", "")
        if known:
            axes.plot(interval, (row, row), color=look["color"], linewidth=1.5, solid_capstyle="butt")
        clear = known and (mean.low > 0 or mean.high < 0)
        face = look["color"] if clear else PAGE
        axes.plot([100 * mean.mean], [row], marker=look["marker"], markersize=6, markerfacecolor=face,
                  markeredgecolor=look["color"], linestyle="none", zorder=3)  # fmt: skip
        rows.append((arm, "mean", 100 * mean.mean, *interval))
        rows += [(arm, task, 100 * value, "", "") for task, value in single.items()]
    name_rows(axes, list(found))
    style_axes(axes, "x")
    label_axes(axes, "difference of scores (points; right: better than the control)")
    axes.set_ylim(len(found) - 0.4, -0.5)
    caption = (
        "Each row is an arm; right of 0 it scores higher than the control. Marker and line: the mean of tasks with "
        "its 95% interval over training seeds, filled if it excludes 0. Dots: single tasks."
    )
    headers = ("arm", "task", "difference_points", "low", "high")
    return Plot("differences", "Differences from the control", caption, finish(figure, [axes]), headers, rows)


def draw_persistence(data: StudyData) -> Plot | None:
    if not data.persistence:
        return None
    figure, panels = new_figure(
        "Divergence from the reference during the last phase", 0.9 + 2.3 * len(data.persistence), len(data.persistence)
    )
    rows: list[tuple[Cell, ...]] = []
    for axes, (arm, records) in zip(panels, data.persistence.items(), strict=True):
        for number, (region, layers) in enumerate(regions(data).items()):
            values: dict[float, list[float]] = {}
            for record in records:
                for tokens, table in record.points:
                    values.setdefault(tokens, []).append(float(np.mean(table, 0)[layers].mean()))
                    rows.append((arm, records[0].reference, record.seed, tokens, region, values[tokens][-1]))
            _line_with_range(axes, dict(sorted(values.items())), region, appearance(number))
        style_axes(axes, "y")
        axes.set_ylim(bottom=0)
        label_axes(axes, "", f"{shortened(arm, 20)}: 1 − CKA")
        axes.xaxis.set_major_formatter(lambda value, _: compact(value))
    label_axes(panels[-1], "tokens since the phase began", panels[-1].get_ylabel())
    caption = (
        "A curve that stays up means that the phase does not undo the drift; one that falls to 0 means a return to "
        "the reference. Lines: the mean over training seeds, by region of layers; bands: from the least to the "
        "greatest seed."
    )
    headers = ("arm", "reference", "seed", "tokens", "region", "divergence")
    return Plot("persistence", "Persistence by region", caption, finish(figure, panels[:1]), headers, rows)


def _line_with_range(axes: Axes, values: dict[float, list[float]], label: str, look: dict[str, Any]) -> None:
    x = list(values)
    axes.plot(x, [np.mean(own) for own in values.values()], label=label, linewidth=1.6, markersize=4, **look)
    if max(map(len, values.values())) > 1:
        low, high = ([end(own) for own in values.values()] for end in (min, max))
        axes.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)


def draw_sweeps(data: StudyData) -> Plot | None:
    """Draw scores and losses by the tokens of the last phase, for arms that differ only in these."""
    groups = decay_sweeps(data)
    means = {arm: {seed: 100 * x for seed, x in data.seed_means(arm).items()} for group in groups for arm in group}
    losses = {arm: data.losses(arm) for group in groups for arm in group}
    shown = [(y, of) for y, of in (("mean score (%)", means), ("final MLM loss", losses)) if any(of.values())]
    if not shown:
        return None
    figure, panels = new_figure("Tokens of the decay", 0.8 + 2.2 * len(shown), len(shown), sharex=True)
    rows: list[tuple[Cell, ...]] = []
    for axes, (quantity, values) in zip(panels, shown, strict=True):
        for number, group in enumerate(groups):
            rows += _sweep(axes, data, [arm for arm in group if values[arm]], values, number, quantity)
        style_axes(axes, "y")
        label_axes(axes, "", quantity)
    budgets = sorted({last_tokens(data.arms[arm].phases[-1]) for group in groups for arm in group})
    if budgets[-1] > 8 * max(budgets[0], 1):
        panels[-1].set_xscale("log")
    panels[-1].set_xticks(budgets, [compact(budget) for budget in budgets])
    panels[-1].minorticks_off()
    label_axes(panels[-1], "tokens of the last phase", panels[-1].get_ylabel())
    caption = (
        "Arms that differ only in the length of their last phase; a peak of the score, or a trough of the loss, is "
        "the best length. Vertical lines: 95% intervals of the mean over training seeds (Student's t)."
    )
    headers = ("arm", "decay_tokens", "quantity", "mean", "low", "high", "seeds")
    return Plot("decay_sweep", "Decay sweep", caption, finish(figure, panels[:1]), headers, rows)


def _sweep(
    axes: Axes, data: StudyData, arms: list[str], values: dict[str, dict[int, float]], number: int, quantity: str
) -> list[tuple[Cell, ...]]:
    look, rows = appearance(number), []
    for arm in arms:
        tokens, spread = last_tokens(data.arms[arm].phases[-1]), Spread.from_values(list(values[arm].values()))
        interval = spread.interval()
        if interval:
            axes.plot((tokens, tokens), interval, color=look["color"], linewidth=1.1)
        rows.append((arm, tokens, quantity, spread.mean, *(interval or ("", "")), spread.count))
    label = f"{arms[0]} … {arms[-1]}" if len(arms) > 1 else "".join(arms)
    axes.plot([row[1] for row in rows], [row[3] for row in rows], label=label, linewidth=1.6, markersize=5, **look)
    return rows


def draw_transplants(data: StudyData) -> Plot | None:
    if not data.transplants:
        return None
    heights = [0.3 * len(found) + 0.5 for found in data.transplants.values()]
    options = {"gridspec_kw": {"height_ratios": heights}}
    figure, panels = new_figure("Parts copied from the donor", 0.7 + sum(heights), len(heights), **options)
    rows: list[tuple[Cell, ...]] = []
    for axes, ((donor, recipient, task), found) in zip(panels, data.transplants.items(), strict=True):
        scale = 1 if task == LOSS else 100
        for row, (part, figures) in enumerate(found.items()):
            values = [scale * figure for figure in figures.values()]
            dots = {"marker": "o", "markersize": 3.4, "linestyle": "none", "alpha": 0.6, "color": SOFT}
            axes.plot(values, [row + 0.2] * len(values), **dots)
            look, mean = look_of(data, donor if part == "all" else recipient), float(np.mean(values))
            axes.plot([mean], [row], marker="D", markersize=6, linestyle="none", color=look["color"])
            if part in ("none", "all"):
                axes.axvline(mean, color=AXIS, linestyle=":", linewidth=1.2, zorder=0.9)
            rows += [(donor, recipient, task, part, *each) for each in zip(figures, values, strict=True)]
        name_rows(axes, [_part_label(part, donor, recipient) for part in found])
        style_axes(axes, "x")
        score = f"score of a linear probe on {shortened(task, LONGEST_ARM)} (%; right is better)"
        label_axes(axes, "MLM loss on held-out text (nats per masked token; left is better)" if task == LOSS else score)
    caption = (
        "Each row is the recipient with these parts of the donor. A part that carries the difference moves the diamond "
        "from the dotted line of the recipient to that of the donor. Diamonds: means over training seeds; dots: "
        "single seeds."
    )
    headers = ("donor", "recipient", "measure", "parts", "seed", "percent_or_nats")
    return Plot("transplants", "Transplants", caption, figure, headers, rows)


def _part_label(part: str, donor: str, recipient: str) -> str:
    return visible({"none": f"none ({recipient})", "all": f"all ({donor})"}.get(part, part))


def draw_all(data: StudyData) -> dict[str, Plot]:
    """Return the plots that have data, by file name."""
    from megatron_detour.study.page.curves import draw_curves
    from megatron_detour.study.page.drift_plots import draw_drift, draw_ratio

    drawing: tuple[Callable[[StudyData], Plot | None], ...] = (
        draw_differences, draw_curves, draw_drift, draw_ratio, draw_persistence, draw_sweeps, draw_transplants,
    )  # fmt: skip
    return {plot.file: plot for draw in drawing if (plot := draw(data)) is not None}
