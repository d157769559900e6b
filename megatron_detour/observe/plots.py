"""The plots of a run's report, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_detour.objectives import KINDS
from megatron_detour.observe.frame import Curve, Frame, dot, objective_colour, objective_label, thinned
from megatron_detour.observe.run_folder import (
    ACCURACIES,
    BITS_PER_BYTE,
    LOSSES,
    VALIDATION_FIGURES,
    Run,
    stretches,
    validation_points,
)
from megatron_detour.observe.sinks import Record
from megatron_detour.observe.steps import Steps
from megatron_detour.ui.colors import COLOURS, GUARD, PALETTE, SOFT
from megatron_detour.ui.format import compact

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKS = 400  # of a guard, side by side over the width of a plot
LEAST_WAIT = 0.01  # of the time; a scale of less would draw noise
STYLES = ["-", (0, (5, 2)), (0, (1, 1.4)), (0, (6, 2, 1.5, 2)), (0, (3, 1.5, 1, 1.5, 1, 1.5))]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]


@dataclass(frozen=True)
class Plot:
    """A plot of the page: its file below plots/, its caption, and how it is drawn."""

    file: str
    title: str
    caption: str
    draw: Callable[[Run], Figure | None]


def has(records: list[Record], key: str) -> bool:
    return any(record.get(key) is not None for record in records)


def percent(axes: Axes) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))


def counted(axes: Axes) -> None:
    """Whole amounts from zero, in short."""
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: compact(value))


def appearance(number: int) -> dict[str, Any]:
    """Colour, line and marker of the line of this number, from 0."""
    return {
        "color": PALETTE[number % len(PALETTE)],
        "linestyle": STYLES[number % len(STYLES)],
        "marker": MARKERS[number % len(MARKERS)],
    }


def markers(axes: Axes, x: list[float], y: list[float], label: str, **look: Any) -> None:
    """A line through a few measurements; among hundreds the markers would hide the line."""
    every = max(1, len(x) // 40)
    x, y = thinned(np.asarray(x), np.asarray(y))
    axes.plot(x, y, markersize=5, markevery=every, linewidth=1.6, label=label, clip_on=False, **look)


def _draw_loss(run: Run) -> Figure | None:
    if not run.steps.has("loss"):
        return None
    frame = Frame([run], "Training loss", ["loss (nats per labelled token)"])
    frame.curves(frame.panels[0], _by_objective(run, "loss", " loss"))
    _guards(frame.panels[0], run)
    return frame.finish()


def _draw_gradient_norm(run: Run) -> Figure | None:
    if not run.steps.has("grad_norm"):
        return None
    frame = Frame([run], "Gradient norm", ["norm before clipping"], height=2.9)
    frame.curves(frame.panels[0], _by_objective(run, "grad_norm"), from_zero=True)
    _guards(frame.panels[0], run)
    return frame.finish()


def _draw_learning_rate(run: Run) -> Figure | None:
    if not run.steps.has("lr"):
        return None
    frame = Frame([run], "Learning rate", ["learning rate"], height=2.9)
    _exact(frame.panels[0], run, "lr")
    frame.panels[0].ticklabel_format(axis="y", style="sci", scilimits=(-2, 4), useMathText=True)
    return frame.finish()


def _draw_schedule(run: Run) -> Figure | None:
    """The objectives' scheduled figures, such as the mask rate, and the batch, where they change within the run."""
    shares = {key: axis for kind in KINDS.values() for key, axis in kind.scheduled.items() if run.steps.varies(key)}
    batch = {"sequences": "sequences per step"} if run.steps.varies("sequences") else {}
    axes_of = shares | batch
    if not axes_of:
        return None
    title = " and ".join([*(key.replace("_", " ") for key in shares), *(["batch"] if batch else [])]).capitalize()
    frame = Frame([run], title, list(axes_of.values()), height=1.6 + 1.3 * len(axes_of))
    for axes, key in zip(frame.panels, axes_of, strict=True):
        _exact(axes, run, key)
        percent(axes) if key in shares else counted(axes)
    return frame.finish()


def _draw_throughput(run: Run) -> Figure | None:
    if not run.steps.has("tokens_per_second"):
        return None
    use = next((key for key in ("mfu", "model_tflops") if run.steps.has(key)), None)
    labels = {"mfu": ["MFU"], "model_tflops": ["model TFLOP/s"], None: []}[use]
    frame = Frame([run], "Throughput", ["tokens per second", *labels], height=4.6 if use else 2.9)
    frame.curves(frame.panels[0], _by_objective(run, "tokens_per_second"), from_zero=True)
    counted(frame.panels[0])
    if use:
        frame.curves(frame.panels[1], _by_objective(run, use), from_zero=True)
    if use == "mfu":
        percent(frame.panels[1])
    return frame.finish()


def _draw_machine(run: Run) -> Figure | None:
    waits = _waits(run.steps)
    waited, memory = waits.has("waiting"), run.steps.has("memory_bytes")
    labels = ["waiting for data"] * waited + ["memory (GiB)"] * memory
    if not labels:
        return None
    frame = Frame([run], "Data wait and memory", labels, height=2.9 if len(labels) == 1 else 4.2)
    if waited:
        x, y = waits.points("waiting")
        frame.curves(frame.panels[0], [Curve(x, y, SOFT, "_share of the step's time")], from_zero=True)
        frame.panels[0].set_ylim(0, max(frame.panels[0].get_ylim()[1], LEAST_WAIT))
        percent(frame.panels[0])
    if memory:
        x, y = thinned(*run.steps.points("memory_bytes"))
        frame.panels[-1].plot(x, y / 2**30, color=SOFT, linewidth=1.8, **dot(x))
        counted(frame.panels[-1])
    return frame.finish()


def _waits(steps: Steps) -> Steps:
    seconds = steps["seconds"]
    timed = np.where(seconds > 0, seconds, np.nan)
    return steps.replaced("waiting", steps["data_wait_seconds"] / timed)


def _draw_validation(run: Run) -> Figure | None:
    losses, accuracies = _measured(run, LOSSES), _measured(run, ACCURACIES)
    if not losses and not accuracies:
        return None
    labels = ["loss (nats per token)"] * bool(losses) + [VALIDATION_FIGURES[key].title for key in accuracies]
    frame = Frame([run], "Validation", labels, height=1.6 + 1.8 * len(labels))
    for key in losses:
        _held_out(frame.panels[0], run, key)
    unigram = run.environment.get("unigram_loss")
    if losses and unigram is not None:
        label = "unigram distribution of the corpus"
        frame.panels[0].axhline(unigram, color=SOFT, linestyle=":", linewidth=1.6, label=label)
    for axes, key in zip(frame.panels[len(frame.panels) - len(accuracies) :], accuracies, strict=True):
        _held_out(axes, run, key)
        percent(axes)
    for axes in frame.panels:
        axes.margins(y=0.14)
    return frame.finish()


def _draw_bits_per_byte(run: Run) -> Figure | None:
    keys = _measured(run, BITS_PER_BYTE)
    if not keys:
        return None
    frame = Frame([run], "Validation, bits per byte", ["bits per byte of text"])
    for key in keys:
        _held_out(frame.panels[0], run, key)
    frame.panels[0].margins(y=0.14)
    return frame.finish()


def _draw_validation_corpora(run: Run) -> Figure | None:
    keys = [key for key in VALIDATION_FIGURES if key not in BITS_PER_BYTE and _corpora_with(run, key)]
    if not keys:
        return None
    labels = [VALIDATION_FIGURES[key].title for key in keys]
    frame = Frame([run], "Validation by corpus", labels, height=2 + 1.6 * len(keys))
    for axes, key in zip(frame.panels, keys, strict=True):
        for corpus in _corpora_with(run, key):
            x, y = validation_points(run, f"{key}/{corpus}")
            markers(axes, x, y, corpus, **appearance(run.validation_corpora.index(corpus)))
        axes.margins(y=0.14)
        if VALIDATION_FIGURES[key].share:
            percent(axes)
    return frame.finish()


def _measured(run: Run, keys: list[str]) -> list[str]:
    return [key for key in keys if has(run.validations, key)]


def _corpora_with(run: Run, key: str) -> list[str]:
    return [corpus for corpus in run.validation_corpora if has(run.validations, f"{key}/{corpus}")]


def _held_out(axes: Axes, run: Run, key: str) -> None:
    figure = VALIDATION_FIGURES[key]
    x, y = validation_points(run, key)
    # The accuracy has a panel of its own, whose axis names it.
    label = "_accuracy" if figure.share else f"{figure.title}, held-out text"
    marker = KINDS[figure.objective].marker
    markers(axes, x, y, label, color=COLOURS[figure.objective], marker=marker)


def _by_objective(run: Run, key: str, quantity: str = "") -> list[Curve]:
    return [
        Curve(*steps.points(key), objective_colour(objective), f"{objective_label(objective)}{quantity}")
        for objective, steps in stretches(run)
    ]


def _exact(axes: Axes, run: Run, key: str) -> None:
    """A figure that is set and not measured: it is not smoothed."""
    for objective, steps in stretches(run):
        x, y = thinned(*steps.points(key))
        if len(x):
            colour, label = objective_colour(objective), objective_label(objective)
            axes.plot(x, y, color=colour, linewidth=1.8, label=label, **dot(x))
    axes.set_ylim(bottom=0)


def _guards(axes: Axes, run: Run) -> None:
    """Marks at the top the steps at which a guard spoke."""
    skipped = [record for record in run.guarded if record.get("skipped")]
    reported = [record for record in run.guarded if not record.get("skipped")]
    for records, marker, label in ((skipped, "x", "update left out"), (reported, "v", "spike reported")):
        # as many as can be told apart
        place = {round(MARKS * x / max(run.done_tokens, 1)): x for x in (run.tokens_at(r["step"]) for r in records)}
        if x := list(place.values()):
            look = {"color": GUARD, "marker": marker, "markersize": 5, "linestyle": "none", "clip_on": False}
            axes.plot(x, [0.985] * len(x), transform=axes.get_xaxis_transform(), label=label, **look)


PLOTS = [
    Plot(
        "validation.png",
        "Validation",
        "Every objective is measured on held-out text in every phase. Losses of different objectives are different "
        "quantities: compare each only with itself.",
        _draw_validation,
    ),
    Plot(
        "bits_per_byte.png",
        "Validation, bits per byte",
        "The same losses for each byte of the text, which tokenizers of different fineness share.",
        _draw_bits_per_byte,
    ),
    Plot(
        "validation_corpora.png",
        "Validation by corpus",
        "The held-out text of each validation corpus by itself.",
        _draw_validation_corpora,
    ),
    Plot(
        "loss.png",
        "Training loss",
        "Each step faintly, and a centred mean per phase. The objective sets the color; losses of different "
        "objectives are different quantities.",
        _draw_loss,
    ),
    Plot(
        "gradient_norm.png",
        "Gradient norm",
        "The norm of the gradient over all parameters, before clipping.",
        _draw_gradient_norm,
    ),
    Plot("learning_rate.png", "Learning rate", "The rate that each step used.", _draw_learning_rate),
    Plot(
        "schedule.png",
        "Mask rate and batch",
        "What each step used: the share of tokens masked, and the sequences per step.",
        _draw_schedule,
    ),
    Plot(
        "throughput.png",
        "Throughput",
        "Tokens per second of each step over all devices, padding included. MFU is the model's operations as a share "
        "of the devices' peak.",
        _draw_throughput,
    ),
    Plot(
        "machine.png",
        "Data wait and memory",
        "The share of each step's time spent waiting for data, and the most memory held so far on one rank.",
        _draw_machine,
    ),
]
