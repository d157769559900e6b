"""Plots of the drift: divergence of arms by layer, and its ratio to the noise of seeds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from megatron_detour.study.data import StudyData, regions
from megatron_detour.study.page.plots import Cell, Plot, finish, label_axes, look_of, name_rows, new_figure
from megatron_detour.ui.colors import AXIS, INK, LIGHT, SOFT
from megatron_detour.ui.figures import style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_NUMBERS, MOST_DIGITS = 32, 16  # layers; the numbers of more do not fit, nor three digits
STRONGEST = 0.55  # opacity of the greatest divergence: text on it keeps its contrast in light and dark pages
NOISE = "noise of seeds"


def draw_drift(data: StudyData) -> Plot | None:
    """Draw the divergence as a table of arms by layers."""
    if not data.drifts:
        return None
    values = {arm: np.mean([drift.divergence for drift in drifts], 0) for arm, drifts in data.drifts.items()}
    noise = [drift.noise for drifts in data.drifts.values() for drift in drifts if drift.noise is not None]
    values |= {NOISE: np.mean(noise, 0)} if noise else {}
    figure, (axes,) = new_figure("Divergence by layer (1 − CKA)", 1.3 + 0.36 * len(values), pad=18)
    greatest = max(float(np.max(divergence)) for divergence in values.values())
    for row, divergence in enumerate(values.values()):
        for layer, value in enumerate(divergence):
            _cell(axes, layer, row, float(value), greatest, len(divergence))
    name_rows(axes, list(values))
    axes.set_xlim(-0.5, data.registration.depth - 0.5)
    axes.set_xticks(range(0, data.registration.depth, 1 if data.registration.depth <= MOST_NUMBERS else 4))
    _mark_regions(axes, data)
    axes.tick_params(length=0, labelsize=8.5, colors=INK)
    axes.spines[:].set_visible(False)
    label_axes(axes, "layer")
    caption = (
        "Cells of a stronger color are layers whose representations of the same texts differ more from the "
        f"reference (0: not at all, 1: nothing in common; the strongest is {greatest:.2g})."
        + (f" The row {NOISE!r} is what another seed alone changes." if noise else "")
        + " Means over training seeds."
    )
    rows: list[tuple[Cell, ...]] = [
        (arm, drift.seed, layer, float(own), "" if drift.noise is None else float(drift.noise[layer]))
        for arm, drifts in data.drifts.items()
        for drift in drifts
        for layer, own in enumerate(drift.divergence)
    ]
    headers = ("arm", "seed", "layer", "divergence", "noise")
    return Plot("drift", "Drift by arm and layer", caption, figure, headers, rows)


def _cell(axes: Axes, layer: int, row: int, value: float, greatest: float, layers: int) -> None:
    from matplotlib.patches import Rectangle

    shade = STRONGEST * max(value, 0.0) / greatest if greatest > 0 else 0.0
    look = {"facecolor": LIGHT["run-5"], "alpha": shade, "linewidth": 0}
    axes.add_patch(Rectangle((layer - 0.48, row - 0.46), 0.96, 0.92, **look))
    few = layers <= MOST_DIGITS
    if layers <= MOST_NUMBERS:
        text = f"{value:.2f}" if value >= 0.1 or not few else f"{value:.3f}"
        text = text.replace("0.", ".", 1)
        axes.text(layer, row, text, ha="center", va="center", fontsize=7.6, color=INK)


def draw_ratio(data: StudyData) -> Plot | None:
    """Draw the ratio of divergence to the noise of seeds by layer."""
    found = {arm: [drift for drift in drifts if drift.noise is not None] for arm, drifts in data.drifts.items()}
    ratios = {arm: np.array([drift.ratio() for drift in drifts]) for arm, drifts in found.items() if drifts}
    ratios = {arm: ratio for arm, ratio in ratios.items() if (ratio > 0).all()}
    if not ratios:
        return None
    figure, (axes,) = new_figure("Divergence in units of the noise of seeds", 3.2, pad=18)
    x, rows = range(data.registration.depth), []
    for arm, ratio in ratios.items():
        look = look_of(data, arm)
        axes.plot(x, np.exp(np.log(ratio).mean(0)), label=arm, linewidth=1.6, markersize=4.5, **look)
        if len(ratio) > 1:
            axes.fill_between(x, ratio.min(0), ratio.max(0), color=look["color"], alpha=0.15, linewidth=0)
        rows += [
            (arm, drift.seed, layer, float(value))
            for drift, own in zip(found[arm], ratio, strict=True)
            for layer, value in enumerate(own)
        ]
    axes.axhline(1, color=SOFT, linestyle=":", linewidth=1.4, label="as much as another seed")
    _logarithmic(axes)
    axes.set_xticks(range(0, data.registration.depth, 1 if data.registration.depth <= MOST_NUMBERS else 4))
    _mark_regions(axes, data)
    style_axes(axes, "y")
    label_axes(axes, "layer", "divergence / noise (log scale)")
    caption = (
        "Above 1 (dotted) the arm differs from the reference by more than another seed would. Lines: geometric means "
        "over training seeds; bands: from the least to the greatest seed. The scale is logarithmic."
    )
    headers = ("arm", "seed", "layer", "ratio")
    return Plot("drift_ratio", "Drift ratio by layer", caption, finish(figure, [axes]), headers, rows)


def _logarithmic(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(LogLocator(subs=()))


def _mark_regions(axes: Axes, data: StudyData) -> None:
    """Name the thirds of the depth above the panel, with lines between them."""
    for name, layers in regions(data).items():
        if name == "all":
            continue
        if layers[0]:
            axes.axvline(layers[0] - 0.5, color=AXIS, linewidth=1.0)
        middle = (layers[0] + layers[-1]) / 2
        place = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "ha": "center"}
        axes.annotate(name, (middle, 1), (0, 2), fontsize=8.5, color=SOFT, **place)
