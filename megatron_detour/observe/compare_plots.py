"""The plots of a comparison: several runs over the tokens that each has trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_detour.objectives import KINDS, Objective
from megatron_detour.observe.frame import Curve, Frame, objective_label
from megatron_detour.observe.plots import appearance, counted, has, markers, percent
from megatron_detour.observe.run_folder import BITS_PER_BYTE, VALIDATION_FIGURES, Run, stretches, validation_points

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ComparisonPlot:
    """A plot of the page: its file, its caption, and how it is drawn for runs with these labels."""

    file: str
    title: str
    caption: str
    draw: Callable[[list[Run], list[str]], Figure | None]


def _frame(runs: list[Run], title: str, labels: list[str]) -> Frame:
    colours = [appearance(number)["color"] for number in range(len(runs))]
    return Frame(runs, title, labels, height=2 + 1.65 * len(labels), colours=colours)


def _draw_validation(runs: list[Run], labels: list[str], title: str, keys: list[str]) -> Figure | None:
    keys = [key for key in keys if any(has(run.validations, key) for run in runs)]
    if not keys:
        return None
    frame = _frame(runs, title, [VALIDATION_FIGURES[key].axis for key in keys])
    for axes, key in zip(frame.panels, keys, strict=True):
        for number, run in enumerate(runs):
            x, y = validation_points(run, key)
            if x:
                markers(axes, x, y, labels[number], **appearance(number))
        axes.margins(y=0.14)
        if VALIDATION_FIGURES[key].share:
            percent(axes)
    return frame.finish()


def _draw_bits_per_byte(runs: list[Run], labels: list[str]) -> Figure | None:
    return _draw_validation(runs, labels, "Validation, bits per byte", BITS_PER_BYTE)


def _draw_loss(runs: list[Run], labels: list[str]) -> Figure | None:
    trained = dict.fromkeys([*KINDS, *(phase["objective"] for run in runs for phase in run.phases)])
    curves = {name: _curves(runs, labels, "loss", name) for name in trained}
    held = [name for name in curves if curves[name]]
    if not held:
        return None
    frame = _frame(runs, "Training loss", [f"{objective_label(name)} loss (nats per token)" for name in held])
    for axes, name in zip(frame.panels, held, strict=True):
        frame.curves(axes, curves[name])
    return frame.finish()


def _draw_gradient_norm(runs: list[Run], labels: list[str]) -> Figure | None:
    curves = _curves(runs, labels, "grad_norm")
    if not curves:
        return None
    frame = _frame(runs, "Gradient norm", ["norm before clipping"])
    frame.curves(frame.panels[0], curves, from_zero=True)
    return frame.finish()


def _draw_throughput(runs: list[Run], labels: list[str]) -> Figure | None:
    curves = {key: _curves(runs, labels, key) for key in ("tokens_per_second", "mfu")}
    held = [key for key in curves if curves[key]]
    if not held:
        return None
    titles = {"tokens_per_second": "tokens per second", "mfu": "MFU"}
    frame = _frame(runs, "Throughput", [titles[key] for key in held])
    for axes, key in zip(frame.panels, held, strict=True):
        frame.curves(axes, curves[key], from_zero=True)
        percent(axes) if key == "mfu" else counted(axes)
    return frame.finish()


def _curves(runs: list[Run], labels: list[str], key: str, objective: str | None = None) -> list[Curve]:
    """The figure of each run over each of its phases, or over those of one objective."""
    drawn = []
    for number, run in enumerate(runs):
        look = appearance(number)
        for own, steps in stretches(run):
            x, y = steps.points(key)
            if len(y) and objective in (None, own):
                drawn.append(Curve(x, y, look["color"], labels[number], look["linestyle"], faint=False))
    return drawn


def _validation_plot(kind: type[Objective]) -> ComparisonPlot:
    title = f"Validation, {kind.label}"
    keys = [
        key for key, figure in VALIDATION_FIGURES.items() if figure.objective == kind.name and key not in BITS_PER_BYTE
    ]
    return ComparisonPlot(
        f"validation_{kind.name}.png",
        title,
        kind.validated_as,
        lambda runs, labels: _draw_validation(runs, labels, title, keys),
    )


COMPARISON_PLOTS = [
    *map(_validation_plot, KINDS.values()),
    ComparisonPlot(
        "bits_per_byte.png",
        "Validation, bits per byte",
        "The losses for each byte of the text, which tokenizers of different fineness share.",
        _draw_bits_per_byte,
    ),
    ComparisonPlot(
        "loss.png",
        "Training loss",
        "A centered mean per phase, each objective by itself: losses of different objectives are different "
        "quantities, and MLM losses at different mask rates do not compare.",
        _draw_loss,
    ),
    ComparisonPlot(
        "gradient_norm.png",
        "Gradient norm",
        "The norm of the gradient over all parameters, before clipping; a centred mean per phase.",
        _draw_gradient_norm,
    ),
    ComparisonPlot(
        "throughput.png",
        "Throughput",
        "Tokens per second over all devices, padding included; MFU where the devices' peak is known.",
        _draw_throughput,
    ),
]
