from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_detour.observe import frame, plots
from megatron_detour.observe.run_folder import read_run
from megatron_detour.ui.colors import COLORS
from tests.observe.runs import (
    FREEZE,
    TOKENS_PER_STEP,
    TWO_PHASES,
    change_records,
    five_phases,
    make_run,
)
from tests.observe.shown import refuse_overlaps


def test_the_plots_show_what_they_should(tmp_path: Path) -> None:
    figure = plots._draw_validation([read_run(make_run(tmp_path))], [""])
    loss, accuracy = figure.axes[1:]
    labels = loss.get_legend_handles_labels()[1]
    assert plots.UNIGRAM in labels
    assert labels.count("objective switch") == 2 and labels.count("resumed from a checkpoint") == 1
    switches = [line.get_xdata()[0] for line in loss.lines if line.get_label() == "objective switch"]
    assert switches == [60 * TOKENS_PER_STEP, 240 * TOKENS_PER_STEP]
    resumed = next(line for line in loss.lines if line.get_label() == "resumed from a checkpoint")
    assert resumed.get_xdata()[0] == 100 * TOKENS_PER_STEP
    low, high = loss.get_ylim()
    assert low < 2.26 and high > 9.4 and accuracy.get_ylabel() == "MLM accuracy"
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(legend) == len(set(legend)) == 5


def test_color_follows_the_objective(tmp_path: Path) -> None:
    figure = plots._draw_loss([read_run(make_run(tmp_path))], [""])
    colors = {line.get_label(): line.get_color() for line in figure.axes[1].lines}
    assert colors["MLM loss"] == COLORS["mlm"]
    assert colors["CLM loss"] == COLORS["clm"]


def test_the_first_outliers_do_not_set_the_range(tmp_path: Path) -> None:
    folder = make_run(tmp_path, TWO_PHASES)
    change_records(folder, {1: {"loss": 500.0}})
    figure = plots._draw_loss([read_run(folder)], [""])
    axes = figure.axes[1]
    assert 5 < axes.get_ylim()[1] < 12
    assert any("1 value above the range shown" in text.get_text() for text in axes.texts)


def test_a_steady_fall_is_shown_whole(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path, [("detour", "clm", None, 600)], validate_every=0))
    axes = plots._draw_loss([run], [""]).axes[1]
    assert axes.get_ylim()[1] > run.steps["loss"].max()
    assert not axes.texts


def test_names_of_phases_stay_inside_their_bands(tmp_path: Path) -> None:
    phases = [
        ("a long name for a warm-up phase", "mlm", 0.3, 30),
        ("x", "clm", None, 200),
        ("a narrow cooldown", "mlm", 0.15, 4),
    ]
    run = read_run(make_run(tmp_path, phases))
    strip = plots._draw_loss([run], [""]).axes[0]
    bounds = strip.get_window_extent()
    for phase, text in zip(run.phases, strip.texts, strict=True):
        extent = text.get_window_extent()
        left, right = (
            bounds.x0 + bounds.width * phase[key] / run.done_tokens for key in ("start_tokens", "end_tokens")
        )
        assert extent.x0 >= left - 1 and extent.x1 <= right + 1, phase["name"]
        assert bounds.y0 <= extent.y0 and extent.y1 <= bounds.y1, phase["name"]
    assert [text.get_text() for text in strip.texts] == ["1", "x: CLM", "3"]
    assert strip.get_title(loc="right") == "1 a long name for a warm-up phase,  3 a narrow cooldown"


def test_smoothing_keeps_a_straight_line_and_damps_noise() -> None:
    assert frame.smoothed(np.arange(200.0))[:-3] == pytest.approx(range(197))
    noisy = frame.smoothed((-1.0) ** np.arange(600))
    assert max(map(abs, noisy[20:-20])) < 0.1


def test_the_check_of_overlaps_finds_one() -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    figure.text(0.5, 0.5, "one text")
    figure.text(0.52, 0.5, "another")
    with pytest.raises(AssertionError, match="overlaps"):
        refuse_overlaps(figure)
    beyond = Figure()
    beyond.text(0.95, 0.5, "a long text")
    with pytest.raises(AssertionError, match="leaves"):
        refuse_overlaps(beyond)


@pytest.mark.parametrize("plot", plots.PLOTS, ids=lambda plot: plot.file)
def test_texts_do_not_overlap(plot: plots.Plot, tmp_path: Path) -> None:
    figure = plot.draw([read_run(five_phases(tmp_path))], [""])
    assert figure is not None
    refuse_overlaps(figure)


@pytest.mark.parametrize("plot", plots.PLOTS, ids=lambda plot: plot.file)
def test_no_records_no_plot(plot: plots.Plot, tmp_path: Path) -> None:
    assert plot.draw([read_run(make_run(tmp_path, done=0, validate_every=0))], [""]) is None


@pytest.mark.parametrize("plot", plots.PLOTS, ids=lambda plot: plot.file)
def test_a_single_record_of_missing_figures_is_drawn_or_left_out(plot: plots.Plot, tmp_path: Path) -> None:
    folder = make_run(tmp_path, done=0, validate_every=0)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": null, "grad_norm": null, "mfu": null, "seconds": 0}\n')
    assert plot.draw([read_run(folder)], [""]) is None
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5, "val_mlm_loss/a": 1.0, "val_mlm_loss": 1.0}\n')
    figure = plot.draw([read_run(folder)], [""])
    assert (figure is not None) == (plot.file in {"loss.png", "validation.png", "validation_corpora.png"})


def test_a_figure_that_only_an_unplanned_step_has_is_no_fault(tmp_path: Path) -> None:
    folder = make_run(tmp_path, [("only", "mlm", 0.3, 2)], validate_every=0)
    (folder / "metrics.jsonl").write_text('{"step": 9, "loss": 2.5}\n')
    assert plots._draw_loss([read_run(folder)], [""]) is None


def test_frozen_phases_are_marked_and_named(tmp_path: Path) -> None:
    phases = [("detour", "clm", None, 120, FREEZE), ("decay", "mlm", 0.3, 80)]
    figure = plots._draw_loss([read_run(make_run(tmp_path, phases))], [""])
    strip = figure.axes[0]
    assert [text.get_text() for text in strip.texts] == [
        "detour: CLM, embeddings, layers 0-7 frozen",
        "decay: MLM, 30% masked",
    ]
    hatched = [patch for patch in strip.patches if patch.get_hatch()]
    assert [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in hatched] == [(0, 120 * TOKENS_PER_STEP)]
    assert frame.FROZEN in [text.get_text() for text in figure.legends[0].get_texts()]


def test_guards_are_marked_where_they_spoke(tmp_path: Path) -> None:
    folder = make_run(tmp_path, TWO_PHASES)
    change_records(folder, {7: {"skipped": "x", "loss": None, "grad_norm": None}, 9: {"spike": "y"}})
    run = read_run(folder)
    for draw in (plots._draw_loss, plots._draw_gradient_norm):
        marks = {line.get_label(): list(line.get_xdata()) for line in draw([run], [""]).axes[1].lines}
        assert marks["update skipped"] == [7 * TOKENS_PER_STEP]
        assert marks["spike reported"] == [9 * TOKENS_PER_STEP]


def test_the_schedule_shows_what_varies(tmp_path: Path) -> None:
    assert plots._draw_schedule([read_run(make_run(tmp_path / "a", TWO_PHASES))], [""]) is None
    ramp = [("detour", "clm", None, 120), ("decay", "mlm", 0.3, 80, {"mask_rate_end": 0.1})]
    masked = plots._draw_schedule([read_run(make_run(tmp_path / "b", ramp))], [""])
    assert [axes.get_ylabel() for axes in masked.axes[1:]] == ["mask rate"]
    (rates,) = (line.get_ydata() for line in masked.axes[1].lines if line.get_label() == "MLM")
    assert rates[0] == pytest.approx(0.3) and rates[-1] == pytest.approx(0.1025)
    both = plots._draw_schedule([read_run(five_phases(tmp_path / "c"))], [""])
    assert [axes.get_ylabel() for axes in both.axes[1:]] == ["mask rate", "sequences per step"]


@pytest.mark.parametrize(
    ("left_out", "labels"), [((), ["MFU"]), (("mfu",), ["model TFLOP/s"]), (("mfu", "model_tflops"), [])]
)
def test_throughput_says_what_is_known_of_the_machine(
    tmp_path: Path, left_out: tuple[str, ...], labels: list[str]
) -> None:
    folder = make_run(tmp_path, TWO_PHASES)
    change_records(folder, {step: dict.fromkeys(left_out) for step in range(1, 201)})
    figure = plots._draw_throughput([read_run(folder)], [""])
    assert [axes.get_ylabel() for axes in figure.axes[1:]] == ["tokens per second", *labels]


def test_a_run_of_many_steps_is_drawn_with_few_points(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path, [("detour", "clm", None, 15_900), ("decay", "mlm", 0.3, 1585)], validate_every=0))
    lines = plots._draw_loss([run], [""]).axes[1].lines
    assert 1000 < max(len(line.get_xdata()) for line in lines) <= 2 * frame.BUCKETS + 2
    assert max(line.get_xdata()[-1] for line in lines) > 0.99 * run.done_tokens
