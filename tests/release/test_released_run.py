"""A run that was really killed and resumed, exported: its card names what was trained, and no more."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest

from megatron_detour.observe.sinks import read_metrics
from megatron_detour.release.export import export
from tests.harness import environment
from tests.release.test_card import table
from tests.training.test_run import STEPS, command, finished, run_file, start

pytestmark = pytest.mark.slow
__all__ = ["run_file"]  # a fixture


def test_the_card_of_a_run_that_was_killed_and_resumed(run_file, tmp_path):
    folder = tmp_path / "run"
    arguments = ("--run-file", str(run_file), f"folder={folder}")
    process = subprocess.Popen(
        command(2, *arguments, launcher="deepspeed"),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints" / "step-00000002").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(2)
    export(str(folder), str(tmp_path / "part"), "fp32")
    part = (tmp_path / "part" / "README.md").read_text()
    done = [int(row["Steps"].split(" of ")[0]) for row in table(part, "Training")]
    assert 2 <= sum(done) < sum(STEPS) and "unfinished run" in part and "and resumed" not in part
    finished(start(1, *arguments))
    export(str(folder), str(tmp_path / "whole"), "fp32")
    whole = (tmp_path / "whole" / "README.md").read_text()
    assert [row["Steps"] for row in table(whole, "Training")] == [str(steps) for steps in STEPS]
    assert [row["Tokens"] for row in table(whole, "Training")] == [f"{steps * 8 * 64:,}" for steps in STEPS]
    tokens = read_metrics(folder / "metrics.jsonl")[-1]["tokens"]
    assert f"The run is complete: {sum(STEPS)} steps, {tokens:,} tokens." in whole
    assert "The run was interrupted and resumed after step" in whole
    machines = table(whole, "Machines")
    assert [row["Devices"].split(" x ")[0] for row in machines] == ["2", "1"]
    assert sum(int(row["Steps"]) for row in machines) == sum(STEPS)
