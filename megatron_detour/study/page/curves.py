"""The loss curves of all arms, with their phases above."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_detour.objectives import read_objective
from megatron_detour.study.data import StudyData, last_tokens
from megatron_detour.study.page.plots import LONGEST_ARM, Cell, Plot, finish, label_axes, look_of, new_figure
from megatron_detour.ui.colors import COLORS, INK, PAGE, SOFT
from megatron_detour.ui.figures import style_axes
from megatron_detour.ui.format import compact, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STRIP = 0.2  # inches, height of the phases of an arm
SETTLED = 0.4  # fraction of the last phase after which its values determine the range of the second panel
Curves = dict[str, list[np.ndarray]]  # [points, 2] per training seed: tokens, loss


def draw_curves(data: StudyData) -> Plot | None:
    curves = {arm: own for arm in data.arms if (own := _curves(data, arm))}
    if not curves:
        return None
    plans = _plans(data, list(curves))
    heights = [STRIP * len(plans) + 0.05, 2.3, 2.3]
    options = {"sharex": False, "gridspec_kw": {"height_ratios": heights}}
    figure, panels = new_figure("MLM loss on held-out text under fixed masks", 0.9 + sum(heights), 3, **options)
    edge = max(float(points[-1, 0]) for own in curves.values() for points in own)
    _strip(panels[0], data, plans, edge)
    for axes in panels[1:]:
        for arm, own in curves.items():
            _draw(axes, own, arm, look_of(data, arm))
        style_axes(axes, "y")
        axes.xaxis.set_major_formatter(lambda value, _: compact(value))
        label_axes(axes, "", "nats per masked token")
    panels[1].set_xlim(0, edge)
    _enlarge(panels[2], data, curves, edge)
    label_axes(panels[2], "tokens trained", "nats per masked token")
    rows: list[tuple[Cell, ...]] = [
        (arm, run.seed, tokens, "" if loss is None else loss)
        for arm in curves
        for run in data.runs_of(arm)
        for tokens, loss in run.curve
    ]
    caption = (
        "The loss of predicting masked words, whatever an arm is trained for: it rises in a phase of CLM, which trains "
        "another task. What counts is where a curve ends: lower is better. Bars: the phases of each arm. Thick lines: "
        "means over training seeds; faint ones: each seed. The lower panel enlarges the last phases."
    )
    headers = ("arm", "seed", "tokens", "mlm_loss")
    return Plot("curves", "Loss curves of all arms", caption, finish(figure, panels[:2]), headers, rows)


def _curves(data: StudyData, arm: str) -> list[np.ndarray]:
    """Return the finite points of each run that has any."""
    runs = [{x: y for x, y in run.curve if y is not None} for run in data.runs_of(arm)]
    return [np.array(sorted(points.items()), dtype=np.float64) for points in runs if points]


def _plans(data: StudyData, arms: list[str]) -> list[list[str]]:
    """Return arms grouped by what the strip shows of their phases."""
    groups: dict[str, list[str]] = {}
    for arm in arms:
        shown = [(last_tokens(p), p.get("objective"), bool(p.get("freeze"))) for p in data.arms[arm].phases]
        groups.setdefault(repr(shown), []).append(arm)
    return list(groups.values())


def _strip(axes: Axes, data: StudyData, plans: list[list[str]], edge: float) -> None:
    for row, arms in enumerate(plans):
        start = 0
        for phase in data.arms[arms[0]].phases:
            objective, tokens = str(phase.get("objective", "")), last_tokens(phase)
            color = COLORS.get(objective, SOFT)
            label = read_objective({"objective": objective}).label
            axes.barh(row, tokens, 0.8, start, color=color, alpha=0.35, linewidth=0, label=f"phase of {label}")
            axes.axvline(start, color=PAGE, linewidth=1.2) if start else None
            if phase.get("freeze"):
                look = {"facecolor": "none", "edgecolor": color, "hatch": "/////", "linewidth": 0}
                axes.barh(row, tokens, 0.8, start, label="some layers frozen", **look)
            start += tokens
    names = [shortened(", ".join(arms), LONGEST_ARM) for arms in plans]
    axes.set(xlim=(0, edge), ylim=(len(plans) - 0.5, -0.5), xticks=[])
    axes.set_yticks(range(len(plans)), names, fontsize=7.6, color=INK)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _draw(axes: Axes, runs: list[np.ndarray], arm: str, look: dict[str, Any]) -> None:
    style = {"color": look["color"], "linestyle": look["linestyle"]}
    if len(runs) > 1:
        for points in runs:
            axes.plot(*points.T, color=look["color"], alpha=0.25, linewidth=0.8)
    mean = _mean(runs)
    few = {"marker": look["marker"], "markersize": 4} if len(mean) <= 2 else {}
    axes.plot(*mean.T, label=arm, linewidth=1.7, **style, **few)


def _mean(runs: list[np.ndarray]) -> np.ndarray:
    """Return the mean curve [points, 2] over the tokens at which every run has a value, or the longest curve."""
    shared = sorted(set.intersection(*(set(points[:, 0]) for points in runs)))
    if not shared:
        return max(runs, key=len)
    values = [points[np.isin(points[:, 0], shared), 1] for points in runs]
    return np.column_stack([shared, np.mean(values, 0)])


def _enlarge(axes: Axes, data: StudyData, curves: Curves, edge: float) -> None:
    """Show the last phases, and of the loss the range that it has once it has settled."""
    values, starts = [], []
    for arm, runs in curves.items():
        phases = [last_tokens(phase) for phase in data.arms[arm].phases] or [0]
        starts.append(sum(phases[:-1]))
        for points in runs:
            settled = points[points[:, 0] >= starts[-1] + SETTLED * phases[-1], 1]
            values += [*(settled if len(settled) else points[-1:, 1])]
    start = min(starts) if min(starts) < edge else 0
    axes.set_title("the last phase, enlarged", loc="right", fontsize=8.5, color=SOFT, pad=4)
    margin = 0.08 * (max(values) - min(values)) or 0.01
    axes.set(xlim=(start, edge), ylim=(min(values) - margin, max(values) + margin))
