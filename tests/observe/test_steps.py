from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.report import make_run as long_run
from megatron_detour.errors import DetourError
from megatron_detour.observe import frame
from megatron_detour.observe.report import write_report
from megatron_detour.observe.run_folder import read_run
from megatron_detour.observe.sinks import MetricsFile
from tests.observe.runs import make_run

STEPS = 20_000


def peak(function: Callable[[], Any]) -> int:
    """The most bytes that a call holds at once."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_grows_with_the_steps_and_not_with_their_square(tmp_path: Path) -> None:
    long_run(tmp_path / "run", STEPS)
    path = tmp_path / "run" / "metrics.jsonl"
    assert peak(lambda: read_run(tmp_path / "run")) < 400 * STEPS
    assert peak(lambda: MetricsFile(path, STEPS // 2).close()) < 1 << 20  # a line at a time


def test_the_range_of_a_long_curve_takes_a_few_times_its_own_memory() -> None:
    values = np.sin(np.arange(250_000.0))
    assert peak(lambda: frame._usual_range(values, -1.0)) < 40 * values.nbytes


def test_a_thinned_curve_keeps_its_ends_and_its_peaks() -> None:
    x = np.arange(100_003.0)
    y = np.sin(x / 9000)
    y[[31_234, 77_777]] = 9.0, -9.0
    kept_x, kept = frame.thinned(x, y)
    assert len(kept) <= 2 * frame.BUCKETS + 2 and (np.diff(kept_x) > 0).all()
    assert (kept_x[0], kept_x[-1], kept.max(), kept.min()) == (0, 100_002, 9.0, -9.0)
    assert np.array_equal(frame.thinned(x[:100], y[:100])[1], y[:100])


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ({"step": 3, "loss": "low"}, "line 2: loss is not a valid number"),
        ({"step": 3, "tokens": [1]}, "line 2: tokens is not a valid number"),
        ({"step": 3, "mfu": True}, "line 2: mfu is not a valid number"),
        ({"step": 3, "sequences": 10**400}, "line 2: sequences is not a valid number"),
        ({"step": 3, "val_mlm_loss/a": {}}, "line 2: val_mlm_loss/a is not a valid number"),
        ({"step": -3}, "line 2: invalid step -3"),
        ({"step": 10**40}, "line 2: invalid step 1e"),
    ],
)
def test_a_figure_of_the_wrong_type_is_told_with_its_line(tmp_path: Path, line: dict[str, Any], fault: str) -> None:
    folder = make_run(tmp_path, done=1, validate_every=0)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(f'{json.dumps(line)}\n{{"step": 4}}\n')
    with pytest.raises(DetourError, match=rf"metrics\.jsonl, {fault}"):
        read_run(folder)


def test_infinite_figures_are_no_points(tmp_path: Path) -> None:
    folder = make_run(tmp_path, done=2, validate_every=0)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": Infinity, "val_mlm_loss": NaN, "seconds": -Infinity}\n')
    write_report(folder)
    run = read_run(folder)
    assert np.isnan(run.steps["loss"][-1]) and run.validations == []


def test_steps_out_of_order_or_twice_count_as_they_ran_last(tmp_path: Path) -> None:
    folder = make_run(tmp_path, done=0, validate_every=0)
    steps = [(1, 1.0), (3, 3.0), (2, 2.0), (3, 3.5), (5, 5.0)]
    lines = [json.dumps({"step": step, "loss": loss, "seconds": 2.0}) for step, loss in steps]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    run = read_run(folder)
    assert list(run.steps.numbers) == [1, 2, 3, 5] and list(run.steps["loss"]) == [1.0, 2.0, 3.5, 5.0]
    assert run.steps.total("seconds") == 8.0 and run.steps.mean("loss", "seconds") == 2.875
    assert run.tokens_of_steps().tolist() == [65_536.0] * 4
