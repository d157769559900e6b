"""Runs of the masked next-token, span and hybrid objectives: resumed to the bit, and the same on any split."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from megatron_detour.checkpoint import store
from megatron_detour.corpus.train_tokenizer import train_tokenizer
from megatron_detour.errors import EXIT_INTERRUPTED
from megatron_detour.observe.sinks import read_metrics
from tests.conftest import build
from tests.examples.test_sample import generate
from tests.harness import TIMEOUT_SECONDS
from tests.injections.faults import wait_for
from tests.injections.runs import Session, Setup, begin, figures

pytestmark = pytest.mark.integration

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "local_attention": 32,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
}
SPANS = {"objective": "mlm", "mask_rate": 0.3, "whole_word_masking": True, "longest_span": 10}
KINDS = {
    "mntp": {"objective": "mntp", "mask_rate": 0.3, "mask_rate_end": 0.2},
    "span": SPANS,
    "hybrid": {"objective": "hybrid", "mask_rate": 0.3},
}


def write_run_file(path: Path, prefix: str, held_out: str, tokenizer: Path, phases: list[dict], every: str) -> Path:
    content = {
        "name": "objectives",
        "folder": "set by the test",
        "model": {"config": SHAPE, "tokenizer": str(tokenizer)},
        "data": {"corpora": [{"prefix": prefix}], "sequence_length": 64},
        "batch": {"sequences": 8, "micro_sequences": 4},
        "phases": [{"learning_rate": {"peak": 4e-3}, **phase} for phase in phases],
        "deepspeed": "set by the test",
        "validation": {"corpora": [{"prefix": held_out}], "sequences": 16},
        "checkpoint": {"every": every, "keep": 20},
        "tensorboard": False,
    }
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def started(folder: Path, run_file: Path, setup: Setup) -> Session:
    return begin(folder, run_file, setup, folder.with_suffix(".log"), NO_REPORT="1")


def finished(folder: Path, run_file: Path, setup: Setup) -> list[dict[str, Any]]:
    session = started(folder, run_file, setup)
    assert set(session.wait(TIMEOUT_SECONDS)) == {0}, session.output()[-4000:]
    return figures(folder)


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Figures of every step, final weights and optimizer, all to the bit."""
    assert figures(ours) == figures(theirs)
    final = store.find_checkpoints(theirs / "checkpoints")[-1]
    for name in ("model.safetensors", "optimizer.safetensors"):
        mine, reference = load_file(ours / "checkpoints" / final.name / name), load_file(final / name)
        assert mine.keys() == reference.keys()
        assert [key for key in mine if not torch.equal(mine[key], reference[key])] == []


def test_runs_of_all_objectives_resume_to_the_bit_and_do_not_depend_on_their_split(corpus, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("metformin\namlodipine\ntoux sèche\n", encoding="utf-8")
    more = {"mask_rate": 0.4, "mask_rate_steps": {"2 steps": 0.2}, "causal": True}
    phases = [
        {"name": "mntp", "tokens": "4 steps", "objective": "mntp", **more},
        {"name": "span", "tokens": "4 steps", **SPANS, "entities": str(words)},
        {"name": "hybrid", "tokens": "4 steps", **KINDS["hybrid"]},
    ]
    run_file = write_run_file(tmp_path / "run.yaml", corpus.prefix, corpus.prefix, corpus.tokenizer, phases, "2 steps")
    whole = tmp_path / "whole"
    records = finished(whole, run_file, Setup())
    assert [record.get("mask_rate") for record in records[1:]] == [0.4, 0.4, 0.2, 0.2, *[0.3] * 8]
    assert {"val_mntp_loss", "val_hybrid_loss", "val_mlm_loss", "val_clm_loss"} <= records[0].keys()
    facts = json.loads((whole / "environment.json").read_text())["entities"]
    assert facts == {str(words): store.file_facts(words)["sha256"]}

    resumed = tmp_path / "resumed"
    shutil.copytree(whole, resumed)
    for checkpoint in store.find_checkpoints(resumed / "checkpoints"):
        if store.step_of(checkpoint) > 6:
            shutil.rmtree(checkpoint)
    finished(resumed, run_file, Setup())
    assert_same_run(resumed, whole)

    split = finished(tmp_path / "split", run_file, Setup(4, 2))
    for ours, theirs in zip(split, records, strict=True):
        for key in ("data_crc", "labelled_tokens"):
            assert ours.get(key) == theirs.get(key)
        for key in theirs.keys() & {"loss", "grad_norm", "val_mlm_loss", "val_mntp_loss", "val_hybrid_loss"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), (ours["step"], key)

    words.write_text("metformin\n", encoding="utf-8")
    shutil.rmtree(store.find_checkpoints(whole / "checkpoints")[-1])
    refused = started(whole, run_file, Setup())
    assert refused.wait() == [1]
    assert f"{words}: the file has changed since" in refused.output() and "Traceback" not in refused.output()


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> tuple[str, str, Path]:
    """Prefixes of the sample corpus and of its held-out documents, and their tokenizer."""
    folder = tmp_path_factory.mktemp("sample")
    generate.generate(folder / "texts", 3.0, 0)
    train_tokenizer([folder / "texts/sample.jsonl"], folder / "tokenizer", 1024)
    for name in ("sample", "heldout"):
        build([folder / f"texts/{name}.jsonl"], folder / name, folder / "tokenizer")
    return str(folder / "sample"), str(folder / "heldout"), folder / "tokenizer"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_three_hundred_steps_on_the_sample_are_interrupted_and_resumed_to_the_bit(sample, tmp_path, kind):
    prefix, held_out, tokenizer = sample
    phases = [{"name": "only", "tokens": "300 steps", **KINDS[kind]}]
    run_file = write_run_file(tmp_path / "run.yaml", prefix, held_out, tokenizer, phases, "40 steps")
    whole, struck = tmp_path / "whole", tmp_path / "struck"
    finished(whole, run_file, Setup())
    objective = KINDS[kind]["objective"]
    before, after = (read_metrics(whole / "metrics.jsonl")[step][f"val_{objective}_loss"] for step in (0, -1))
    assert after < before - 1

    for number, step, code in ((signal.SIGTERM, 50, EXIT_INTERRUPTED), (signal.SIGKILL, 130, -signal.SIGKILL)):
        session = started(struck, run_file, Setup())
        wait_for(lambda session=session, step=step: session.step() >= step, session)
        session.kill(number=number)
        assert session.wait() == [code], session.output()[-3000:]
        assert step <= session.step() < 300
    finished(struck, run_file, Setup())
    assert_same_run(struck, whole)
    assert len(json.loads((struck / "environment.json").read_text())["sessions"]) == 3
