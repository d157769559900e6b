"""Averages of a run's weights: what is exported, what the card says of it, and what is refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from megatron_detour.checkpoint import huggingface, store
from megatron_detour.checkpoint.huggingface import Source, load_model
from megatron_detour.checkpoint.state import TrainingState
from megatron_detour.commands.main import main
from megatron_detour.config import load
from megatron_detour.errors import DetourError
from megatron_detour.model.families import read_shape
from megatron_detour.parallel.state import ParallelState
from megatron_detour.release.export import export
from megatron_detour.tokenizer.vocabulary import find_tokenizer, load_vocabulary
from megatron_detour.training.validation import Validation
from tests.conftest import BuiltCorpus
from tests.release.made import PHASES, make_run
from tests.release.test_export import relist

STEPS = (0, 2, 3, 4, 6)
DETOUR, DECAY = PHASES
LONG_DECAY = [DETOUR | {"tokens": "2 steps"}, DECAY | {"tokens": "4 steps"}]  # the end of the detour is always kept
KEPT = {"exp_avg": 0.0, "exp_avg_sq": 0.0, "ema": 0.5}  # of a weight


def made(folder: Path, corpus: BuiltCorpus) -> Path:
    """A run whose checkpoints have different weights."""
    run = make_run(folder, corpus, steps=STEPS, phases=LONG_DECAY)
    for step in STEPS:
        path = store.checkpoint_folder(run / "checkpoints", step)
        generator = torch.Generator().manual_seed(step)
        weights = load_file(path / "model.safetensors")
        noisy = {name: w + 0.02 * torch.randn(w.shape, generator=generator) for name, w in weights.items()}
        save_file(noisy, path / "model.safetensors")
        relist(path)
    return run


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> Path:
    return made(tmp_path_factory.mktemp("average") / "run", corpus)


def weights_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(store.checkpoint_folder(run / "checkpoints", step) / "model.safetensors")


@pytest.mark.parametrize(
    ("which", "steps", "words"),
    [
        ("3", (3, 4, 6), "the mean of the weights after steps 3, 4 and 6"),
        ("step-00000006,step-00000003", (3, 6), "the mean of the weights after steps 3 and 6"),
        ("step-00000006,step-00000002", (2, 6), "the mean of the weights after steps 2 and 6"),
    ],
)
def test_the_mean_is_exact_and_opens_in_transformers(run, tmp_path, which, steps, words):
    from transformers import AutoModelForMaskedLM

    exported = export(str(run), str(tmp_path / "model"), "fp32", average=which)
    assert exported.difference < 1e-5 and exported.checkpoint.name == f"step-{steps[-1]:08d}"
    every = [weights_of(run, step) for step in steps]
    opened = AutoModelForMaskedLM.from_pretrained(tmp_path / "model", dtype=torch.float32).state_dict()
    for name, weight in load_file(tmp_path / "model" / "model.safetensors").items():
        assert torch.equal(weight, torch.stack([own[name].double() for own in every]).mean(0).float()), name
        assert torch.equal(weight, opened[name]), name
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"Its weights are {words}.\n" in card and "not of their average" in card
    assert exported.averaged.losses is None
    assert ("the average mixes phases: detour, decay" in exported.warnings) == (2 in steps)


def test_without_an_average_the_card_says_nothing_of_one(run, tmp_path):
    assert export(str(run), str(tmp_path / "model"), "fp32").averaged is None
    assert "average" not in (tmp_path / "model" / "README.md").read_text()


def test_the_losses_are_those_of_the_runs_validation(run, tmp_path, capsys):
    """Of the last checkpoint and of what was exported, each opened and validated as training does."""
    words = ["--checkpoint", str(run), "--output", str(tmp_path / "model"), "--dtype", "fp32", "--average", "3"]
    main(["convert", *words])
    losses = []
    for folder in (store.checkpoint_folder(run / "checkpoints", 6), tmp_path / "model"):
        config, source = load(run / "run.yaml"), Source(str(folder))
        vocabulary, file = load_vocabulary(folder), find_tokenizer(folder)
        validation = Validation(config, vocabulary, file, 4 * 64, ParallelState(), torch.device("cpu"))
        losses.append(validation(load_model(source, read_shape(source.config(), "tests")))["val_mlm_loss"])
    before, after = losses
    assert abs(before - after) > 1e-3
    said = f"MLM loss on held-out text {after:.4f}; with the last step's own weights {before:.4f})"
    assert capsys.readouterr().out.splitlines()[1].endswith(f"steps 3, 4 and 6 ({said}")
    assert f"steps 3, 4 and 6 ({said}.\n" in (tmp_path / "model" / "README.md").read_text()


@pytest.mark.parametrize(
    ("corpora", "why"), [([], r"no validation\.corpora"), ([{"prefix": "gone"}], r"gone\.manifest\.json")]
)
def test_without_held_out_text_the_losses_are_left_out(run, tmp_path, capsys, corpora, why):
    copy = shutil.copytree(run, tmp_path / "run")
    content = yaml.safe_load((copy / "run.yaml").read_text())
    content["validation"]["corpora"] = corpora
    (copy / "run.yaml").write_text(yaml.safe_dump(content))
    main(["convert", "--checkpoint", str(copy), "--output", str(tmp_path / "model"), "--average", "2"])
    warning, _, averaged, *_ = capsys.readouterr().out.splitlines()
    assert re.match(f"warning: the loss before and after averaging is not measured: .*{why}", warning)
    assert averaged.endswith("model: the mean of the weights after steps 4 and 6")


BAD = {
    "too many": (
        "4",
        r"--average 4: .* has 3 checkpoints of its last phase, 'decay'; set checkpoint\.every",
    ),
    "none": ("0", "--average 0: give the number of checkpoints to average, 2 or more"),
    "one": ("1", "--average 1: give the number of checkpoints to average, 2 or more"),
    "unknown": ("step-00000005,step-00000006", r"'step-00000005' is not a checkpoint of .* \(did you mean 'step-00000"),
    "twice": ("step-00000006,step-00000006", "'step-00000006' is named twice"),
    "a word": ("last", r"'last' is not a checkpoint of .*; it has step-00000002, step-00000003, step-0000"),
    "no average kept": ("ema", r"keeps no moving average; optimizer\.ema is not set"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_averaged_is_told_in_a_sentence(run, tmp_path, kind):
    which, told = BAD[kind]
    with pytest.raises(DetourError, match=told) as fault:
        export(str(run), str(tmp_path / "model"), "fp32", average=which)
    assert "\n" not in str(fault.value) and not list(tmp_path.iterdir())


def test_only_a_run_directory_has_several(run, tmp_path):
    for path in (run / "checkpoints" / "step-00000006", tmp_path):
        with pytest.raises(DetourError, match="has no checkpoints after step 0; give a run directory"):
            export(str(path), str(tmp_path / "model"), "fp32", average="2")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("another shape", "step-00000003 is a checkpoint of another model than .*step-00000006"),
        ("weight missing", r"step-00000003: the weights have no head\.norm\.weight"),
        ("cut short", "damaged checkpoint: .*model.safetensors is missing or has the wrong size"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_told(run, tmp_path, damage, told):
    copy = shutil.copytree(run, tmp_path / "run")
    path = store.checkpoint_folder(copy / "checkpoints", 3)
    if damage == "another shape":
        config = (path / "config.json").read_text()
        (path / "config.json").write_text(config.replace('"local_attention": 32', '"local_attention": 16'))
        relist(path)
    elif damage == "weight missing":
        weights = load_file(path / "model.safetensors")
        del weights["head.norm.weight"]
        save_file(weights, path / "model.safetensors")
        relist(path)
    else:
        (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(DetourError, match=told):
        export(str(copy), str(tmp_path / "model"), "fp32", average="3")
    assert not (tmp_path / "model").exists()


def test_the_moving_average_is_exported(corpus, tmp_path):
    """That of the parameters that were updated, and the weights of those that never were."""
    run = made(tmp_path / "run", corpus)
    last = store.checkpoint_folder(run / "checkpoints", 6)
    weights, state = weights_of(run, 6), huggingface.read_run_state(last)
    updated = [name for name in weights if "layers" in name]
    kinds = {kind: {name: weights[name] * scale for name in updated} for kind, scale in KEPT.items()}
    state["trajectory"]["optimizer.ema"] = 0.999
    huggingface.write_checkpoint(last, TrainingState({}, kinds, dict.fromkeys(updated, 6)), state)
    relist(last)
    exported = export(str(last), str(tmp_path / "model"), "fp32", average="ema")
    assert exported.averaged.text() == "the exponential moving average of the weights, with a decay of 0.999 per step"
    written = load_file(tmp_path / "model" / "model.safetensors")
    for name, weight in weights.items():
        assert torch.equal(written[name], 0.5 * weight if name in updated else weight), name
    (last / "optimizer.safetensors").unlink()
    with pytest.raises(DetourError, match=r"damaged checkpoint: .*optimizer\.safetensors is missing"):
        export(str(last), str(tmp_path / "again"), "fp32", average="ema")
