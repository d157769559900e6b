"""Whole studies of tiny models: killed and resumed, with an arm that diverges, as jobs of a cluster."""

from __future__ import annotations

import json
import random
import shlex
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from megatron_detour.commands.main import main
from megatron_detour.study.records import PARTS
from megatron_detour.study.results import read_lines
from tests.harness import environment, slow
from tests.study.studies import ARMS, write_study

pytestmark = pytest.mark.integration


def command(path: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "megatron_detour", "study", str(path), *words]


def figures(folder: Path) -> list[dict[str, Any]]:
    """The results without the times that they took."""
    return [{key: value for key, value in line.items() if key != "seconds"} for line in read_lines(folder)]


def write_small_study(folder: Path, corpus: Any) -> Path:
    arms = {name: ARMS[name] for name in ("detour", "control")}
    texts = {"files": [str(corpus.jsonl)], "count": 20, "draws": [1, 2]}
    criteria = {"drifts": "drift of all > 0.01", "loss": "control > detour on loss"}
    needle = {"files": [str(corpus.jsonl)], "options": {"lengths": [224], "examples": 42, "learning_rate": 1e-3}}
    analyses = {"drift": {"texts": texts}, "persistence": {"texts": texts}, "transplants": {}, "needle": needle}
    return write_study(folder, corpus, seeds=[1], arms=arms, evaluation=None, criteria=criteria, analyses=analyses)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> list[dict[str, Any]]:
    """The figures of a study that nothing happens to."""
    path = write_small_study(tmp_path_factory.mktemp("whole"), corpus)
    done = subprocess.run(command(path), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "registered" in done.stdout
    return figures(path.parent / "study")


def test_transplants_of_nothing_and_all_have_the_losses_of_the_runs(whole):
    final = {line["arm"]: line["loss"] for line in whole if line["kind"] == "run"}
    losses = {line["parts"]: line["loss"] for line in whole if line["kind"] == "transplant"}
    assert losses.keys() == set(PARTS)
    assert (losses["none"], losses["all"]) == (
        pytest.approx(final["control"], rel=1e-5),
        pytest.approx(final["detour"], rel=1e-5),
    )
    assert len(set(losses.values())) == len(PARTS)


def test_results_say_their_versions(whole):
    (line,) = [line for line in whole if line["kind"] == "versions"]
    assert line["versions"]["torch"] == [version("torch")]


def test_needles_are_of_each_arm(whole):
    found = {line["arm"]: line for line in whole if line["kind"] == "needle"}
    assert list(found) == ["detour", "control"]
    for line in found.values():
        assert line["examples"] == 6 and line["by_length"] == [[224, line["accuracy"]]]
        assert [place for place, _ in line["by_place"]] == ["start", "middle", "end"]


@pytest.mark.parametrize("kills", [1, slow(10)])
def test_a_killed_study_ends_with_the_same_figures(whole, corpus, tmp_path, kills):
    path = write_small_study(tmp_path, corpus)
    rng = random.Random(kills)
    for _ in range(kills):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command(path), env=environment(), **quiet)
        time.sleep(rng.uniform(1, 15))
        process.send_signal(rng.choice((signal.SIGKILL, signal.SIGTERM)))
        process.wait()
    done = subprocess.run(command(path), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert figures(path.parent / "study") == whole


@pytest.mark.slow
def test_an_arm_that_diverges_is_told_and_the_others_go_on(corpus, tmp_path):
    arms = {name: ARMS[name] for name in ("detour", "control", "control2")}
    arms["wild"] = {"set": {"phases.detour.learning_rate.peak": 1e30, "guards.patience": 2}}
    path = write_study(tmp_path, corpus, seeds=[1], arms=arms)
    done = subprocess.run(command(path), env=environment(), capture_output=True, text=True)
    assert done.returncode == 1
    lines = read_lines(tmp_path / "study")
    failures = {line["job"]: line for line in lines if line["kind"] == "failure"}
    assert failures["train/wild-s1"]["status"] == "failed"
    assert failures["evaluate/wild-s1"]["message"] == "needs train/wild-s1, which did not finish"
    assert {line["arm"] for line in lines if line["kind"] == "score"} == {"detour", "control"}
    page = next((tmp_path / "study").glob("*.md")).read_text()
    assert "wild" in page and "failed" in page


@pytest.mark.slow
def test_the_jobs_of_a_cluster_give_the_figures_of_one_machine(whole, corpus, tmp_path, capsys):
    path = write_small_study(tmp_path, corpus)
    assert main(["study", str(path), "--jobs", "list"]) == 0
    jobs = capsys.readouterr().out.strip().splitlines()
    for job in jobs:
        words = shlex.split(job)
        assert words[0] == "megatron-detour"
        command = [sys.executable, "-m", "megatron_detour", *words[1:]]
        subprocess.run(command, env=environment(), check=True, capture_output=True)
    assert figures(tmp_path / "study") == whole


def test_slurm_arrays_follow_each_other(corpus, tmp_path, capsys):
    path = write_study(tmp_path, corpus, seeds=[1])
    assert main(["study", str(path), "--jobs", "slurm"]) == 0
    folder = tmp_path / "study" / "slurm"
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "sbatch").write_text('#!/bin/sh\necho "$@" >> "$0.log"\nwc -l < "$0.log"\n')
    (fake / "sbatch").chmod(0o755)
    env = environment()
    subprocess.run(["bash", str(folder / "submit.sh")], env=env | {"PATH": f"{fake}:{env['PATH']}"}, check=True)
    submitted = (fake / "sbatch.log").read_text().splitlines()
    assert submitted[0].startswith("--parsable --array=1-2 ")
    assert all(f"--dependency=afterany:{number}" in line for number, line in enumerate(submitted[1:], start=1))
    stages = [(folder / f"stage-{number}.txt").read_text().splitlines() for number in range(len(submitted))]
    assert all(f"--array=1-{len(stage)}" in line for stage, line in zip(stages, submitted, strict=True))
    assert json.loads((tmp_path / "study" / "registration.json").read_text())["name"] == "tiny"
