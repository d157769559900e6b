"""The plots of run reports and comparisons; a report is a comparison of one run.

A single run's curves are colored by objective, several runs' curves by run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_detour.objectives import KINDS
from megatron_detour.observe.frame import Curve, Frame, objective_color, objective_label
from megatron_detour.observe.run_folder import VALIDATION_FIGURES, Run, stretches, validation_points
from megatron_detour.observe.sinks import Record
from megatron_detour.observe.steps import Steps
from megatron_detour.ui.colors import GUARD, SOFT
from megatron_detour.ui.figures import MARKERS, appearance, as_counts, as_percentages

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKS = 400  # at most, guard marks over the width of a plot
MIN_WAIT_SCALE = 0.01  # fraction of the time; a smaller scale would show noise
HIGH, LOW = (2.0, 1.6), (1.4, 1.5)  # inches: a figure without panels, and each panel
UNIGRAM = "unigram baseline"


@dataclass(frozen=True)
class Plot:
    """A plot of a page: its file, its drawing function for labeled runs, and its captions.

    `caption` is used in run reports, `compared` in comparisons; without it the plot is omitted there.
    """

    file: str
    title: str
    draw: Callable[[list[Run], list[str]], Figure | None]
    caption: str = ""
    compared: str = ""


@dataclass(frozen=True)
class _Panel:
    label: str
    curves: list[Curve]
    scale: Callable[[Axes], None] | None = None
    from_zero: bool = False
    baseline: float | None = None


def _draw(
    runs: list[Run], title: str, panels: list[_Panel], *, height: tuple[float, float] = HIGH, guards: bool = False
) -> Figure | None:
    """Draw the panels that have curves; None if there are none."""
    panels = [panel for panel in panels if panel.curves]
    if not panels:
        return None
    colors = [appearance(number)["color"] for number in range(len(runs))] if len(runs) > 1 else None
    inches = height[0] + height[1] * len(panels)
    frame = Frame(runs, title, [panel.label for panel in panels], height=inches, colors=colors)
    for axes, panel in zip(frame.panels, panels, strict=True):
        frame.curves(axes, panel.curves, from_zero=panel.from_zero)
        if panel.scale:
            panel.scale(axes)
        if panel.baseline is not None:
            axes.axhline(panel.baseline, color=SOFT, linestyle=":", linewidth=1.6, label=UNIGRAM)
    if guards and len(runs) == 1:
        _mark_guards(frame.panels[0], runs[0])
    return frame.finish()


def _draw_loss(runs: list[Run], labels: list[str]) -> Figure | None:
    if len(runs) == 1:
        curves = _curves(runs, labels, "loss", quantity=" loss")
        return _draw(runs, "Training loss", [_Panel("loss (nats per labeled token)", curves)], guards=True)
    objectives = sorted({objective for run in runs for objective, _ in stretches(run)}, reverse=True)
    panels = [
        _Panel(f"{objective_label(name)} loss (nats per token)", _curves(runs, labels, "loss", objective=name))
        for name in objectives
    ]
    return _draw(runs, "Training loss", panels)


def _draw_gradient_norm(runs: list[Run], labels: list[str]) -> Figure | None:
    panel = _Panel("norm before clipping", _curves(runs, labels, "grad_norm"), from_zero=True)
    return _draw(runs, "Gradient norm", [panel], height=LOW, guards=True)


def _draw_learning_rate(runs: list[Run], labels: list[str]) -> Figure | None:
    def scientific(axes: Axes) -> None:
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4), useMathText=True)

    panel = _Panel("learning rate", _curves(runs, labels, "lr", exact=True), scientific)
    return _draw(runs, "Learning rate", [panel], height=LOW)


def _draw_schedule(runs: list[Run], labels: list[str]) -> Figure | None:
    """Draw the objectives' scheduled fractions, such as the mask rate, and the batch, if they change within a run."""
    shares = {key: key.replace("_", " ") for kind in KINDS.values() for key in kind.scheduled}
    shown = {key: (name, as_percentages) for key, name in shares.items()}
    shown |= {"sequences": ("sequences per step", as_counts)}
    varying = [key for key in shown if any(run.steps.varies(key) for run in runs)]
    panels = [_Panel(shown[key][0], _curves(runs, labels, key, exact=True), shown[key][1]) for key in varying]
    title = " and ".join((shares | {"sequences": "batch"})[key] for key in varying).capitalize()
    return _draw(runs, title, panels, height=LOW)


def _draw_throughput(runs: list[Run], labels: list[str]) -> Figure | None:
    use = "mfu" if any(run.steps.has("mfu") for run in runs) else "model_tflops"
    label, scale = {"mfu": ("MFU", as_percentages), "model_tflops": ("model TFLOP/s", None)}[use]
    panels = [
        _Panel("tokens per second", _curves(runs, labels, "tokens_per_second"), as_counts, from_zero=True),
        _Panel(label, _curves(runs, labels, use), scale, from_zero=True),
    ]
    return _draw(runs, "Throughput", panels if panels[0].curves else [], height=LOW if len(runs) == 1 else HIGH)


def _draw_machine(runs: list[Run], _: list[str]) -> Figure | None:
    def waits(axes: Axes) -> None:
        axes.set_ylim(0, max(axes.get_ylim()[1], MIN_WAIT_SCALE))
        as_percentages(axes)

    def curve(steps: Steps, key: str, unit: int, label: str, exact: bool) -> list[Curve]:
        x, y = steps.points(key)
        return [Curve(x, y / unit, SOFT, label, exact=exact)] if len(y) else []

    (run,) = runs
    panels = [
        _Panel("waiting for data", curve(_waits(run.steps), "waiting", 1, "_share of the step's time", False), waits,
               from_zero=True),
        _Panel("peak memory (GiB)", curve(run.steps, "memory_bytes", 2**30, "_memory", True), as_counts),
    ]  # fmt: skip
    return _draw(runs, "Data wait and memory", panels, height=LOW)


def _waits(steps: Steps) -> Steps:
    seconds = steps["seconds"]
    timed = np.where(seconds > 0, seconds, np.nan)
    return steps.replaced("waiting", steps["data_wait_seconds"] / timed)


def _draw_validation(runs: list[Run], labels: list[str]) -> Figure | None:
    keys = [key for key in VALIDATION_FIGURES if not key.endswith("bits_per_byte")]
    return _draw(runs, "Validation", _validation_panels(runs, labels, keys))


def _draw_bits_per_byte(runs: list[Run], labels: list[str]) -> Figure | None:
    keys = [key for key in VALIDATION_FIGURES if key.endswith("bits_per_byte")]
    return _draw(runs, "Validation, bits per byte", _validation_panels(runs, labels, keys))


def _validation_panels(runs: list[Run], labels: list[str], keys: list[str]) -> list[_Panel]:
    """Return a panel per figure; figures of one run that differ only in objective share a panel."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        if any(_has(run.validations, key) for run in runs):
            groups.setdefault(_measure(key) if len(runs) == 1 else key, []).append(key)
    panels = []
    for group in groups.values():
        figure = VALIDATION_FIGURES[group[0]]
        label = figure.axis if len(group) == 1 else _measure(group[0])
        curves = [curve for key in group for curve in _validation_curves(runs, labels, key)]
        loss = len(runs) == 1 and figure.title.endswith("loss")
        baseline = runs[0].environment.get("unigram_loss") if loss else None
        panels.append(_Panel(label, curves, as_percentages if figure.share else None, baseline=baseline))
    return panels


def _measure(key: str) -> str:
    """Return a figure's quantity, without the objective."""
    return VALIDATION_FIGURES[key].axis.partition(" ")[2]


def _validation_curves(runs: list[Run], labels: list[str], key: str) -> list[Curve]:
    figure = VALIDATION_FIGURES[key]
    if len(runs) == 1:
        objectives = list(dict.fromkeys(each.objective for each in VALIDATION_FIGURES.values()))
        marker = MARKERS[objectives.index(figure.objective)]
        look = {"color": objective_color(figure.objective), "marker": marker}
        # Accuracy has a separate panel, whose axis names it.
        return _validated(runs[0], key, "_accuracy" if figure.share else f"{figure.title}, held-out text", look)
    numbered = enumerate(zip(runs, labels, strict=True))
    return [curve for n, (run, label) in numbered for curve in _validated(run, key, label, appearance(n))]


def _validated(run: Run, key: str, label: str, look: dict[str, Any]) -> list[Curve]:
    x, y = (np.asarray(values, float) for values in validation_points(run, key))
    return [Curve(x, y, label=label, **look)] if len(x) else []


def _draw_validation_corpora(runs: list[Run], _: list[str]) -> Figure | None:
    (run,) = runs
    panels = []
    for key, figure in VALIDATION_FIGURES.items():
        curves = [
            curve
            for number, corpus in enumerate(run.validation_corpora)
            for curve in _validated(run, f"{key}/{corpus}", corpus, appearance(number))
        ]
        panels.append(_Panel(figure.title, curves, as_percentages if figure.share else None))
    return _draw(runs, "Validation by corpus", panels)


def _has(records: list[Record], key: str) -> bool:
    return any(record.get(key) is not None for record in records)


def _curves(
    runs: list[Run], labels: list[str], key: str, *, objective: str = "", quantity: str = "", exact: bool = False
) -> list[Curve]:
    """Return the figure of each run by phase, or only phases of one objective."""
    curves = []
    for number, run in enumerate(runs):
        for own, steps in stretches(run):
            x, y = steps.points(key)
            if not len(y) or objective not in ("", own):
                continue
            if len(runs) == 1:
                curves.append(Curve(x, y, objective_color(own), f"{objective_label(own)}{quantity}", exact=exact))
            else:
                look = {name: value for name, value in appearance(number).items() if name != "marker"}
                curves.append(Curve(x, y, label=labels[number], faint=False, exact=exact, **look))
    return curves


def _mark_guards(axes: Axes, run: Run) -> None:
    """Mark at the top the steps at which a guard acted."""
    skipped = [record for record in run.guarded if record.get("skipped")]
    reported = [record for record in run.guarded if not record.get("skipped")]
    for records, marker, label in ((skipped, "x", "update skipped"), (reported, "v", "spike reported")):
        # no more than are distinguishable
        place = {round(MARKS * x / max(run.done_tokens, 1)): x for x in (run.tokens_at(r["step"]) for r in records)}
        if x := list(place.values()):
            look = {"color": GUARD, "marker": marker, "markersize": 5, "linestyle": "none", "clip_on": False}
            axes.plot(x, [0.985] * len(x), transform=axes.get_xaxis_transform(), label=label, **look)


PLOTS = [
    Plot(
        "validation.png",
        "Validation",
        _draw_validation,
        "Every objective is measured on held-out text in every phase. Losses of different objectives are different "
        "quantities: compare each only with itself.",
        "Held-out text. The top of the page states whether text and masks were the same.",
    ),
    Plot(
        "bits_per_byte.png",
        "Validation, bits per byte",
        _draw_bits_per_byte,
        "The same losses per byte of text, which are comparable between tokenizers.",
        "The losses per byte of text, which are comparable between tokenizers.",
    ),
    Plot(
        "validation_corpora.png",
        "Validation by corpus",
        _draw_validation_corpora,
        "The held-out text of each validation corpus separately.",
    ),
    Plot(
        "loss.png",
        "Training loss",
        _draw_loss,
        "Each step (faint), and a centered mean per phase. Colors are objectives; losses of different objectives are "
        "different quantities.",
        "A centered mean per phase, by objective: losses of different objectives are different "
        "quantities, and MLM losses at different mask rates are not comparable.",
    ),
    Plot(
        "gradient_norm.png",
        "Gradient norm",
        _draw_gradient_norm,
        "The norm of the gradient over all parameters, before clipping.",
        "The norm of the gradient over all parameters, before clipping; a centered mean per phase.",
    ),
    Plot("learning_rate.png", "Learning rate", _draw_learning_rate, "The learning rate of each step."),
    Plot(
        "schedule.png",
        "Mask rate and batch",
        _draw_schedule,
        "The fraction of tokens masked and the sequences per step.",
    ),
    Plot(
        "throughput.png",
        "Throughput",
        _draw_throughput,
        "Tokens per second at each step over all devices, including padding. MFU is the model's FLOP/s as a fraction "
        "of the devices' peak.",
        "Tokens per second over all devices, including padding; MFU if the devices' peak is known.",
    ),
    Plot(
        "machine.png",
        "Data wait and memory",
        _draw_machine,
        "The fraction of each step's time spent waiting for data, and the peak memory of one rank so far.",
    ),
]
