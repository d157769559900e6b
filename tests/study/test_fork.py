"""A run that continues another one has the weights that it would have had alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
from safetensors.torch import load_file

from megatron_detour.errors import DetourError
from megatron_detour.observe.sinks import read_metrics
from megatron_detour.study import fork, work
from megatron_detour.study.plan import StudyRun, read_study
from tests.harness import environment
from tests.study.studies import write_study

pytestmark = pytest.mark.integration


def train(run: StudyRun) -> None:
    command = [sys.executable, "-m", "megatron_detour", "train", str(fork.prepare(run))]
    subprocess.run(command, env=environment(), check=True, capture_output=True)


def test_a_forked_run_equals_a_whole_one_to_the_bit(corpus, tmp_path):
    forked = read_study(write_study(tmp_path, corpus, evaluation=None, criteria={}, seeds=[1]))
    detour, frozen = forked.run("detour", 1), forked.run("decay_frozen", 1)
    with pytest.raises(DetourError, match="decay_frozen-s1 continues detour-s1 at step"):
        fork.prepare(frozen)
    train(detour)
    train(frozen)
    (tmp_path / "alone").mkdir()
    arms = {"decay_frozen": {"set": {"phases.decay.freeze": ["embeddings", "low"]}}}
    alone = read_study(
        write_study(tmp_path / "alone", corpus, evaluation=None, criteria={}, seeds=[1], arms=arms, analyses={})
    ).run("decay_frozen", 1)
    assert alone.fork is None
    train(alone)
    files = ("model.safetensors", "optimizer.safetensors")
    one, other = ([load_file(work.final_model(run) / name) for name in files] for run in (frozen, alone))
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        assert all(a[name].equal(b[name]) for name in a)
    losses = [[record.get("loss") for record in read_metrics(run.folder / "metrics.jsonl")] for run in (frozen, alone)]
    assert losses[0] == losses[1]
