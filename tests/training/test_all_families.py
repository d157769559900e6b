"""Every family of encoders is trained as ModernBERT is: ZeRO-2 over tensor ranks, frozen parts, resuming, release."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from megatron_detour.checkpoint import store
from megatron_detour.checkpoint.huggingface import Source, load_model
from megatron_detour.model.families import FAMILIES, read_shape
from megatron_detour.observe.sinks import read_metrics
from megatron_detour.optimizers import DEFAULT
from megatron_detour.release.export import export
from tests.harness import run_ranks
from tests.injections.runs import PHASE_ENDS, Setup, begin, write_run_file
from tests.models import OWN
from tests.optimizers import ROUNDING
from tests.training.test_zero2 import LEARNING_RATE, check_state, plain_steps, run_config, steps_with

pytestmark = pytest.mark.integration

OTHERS = [name for name in FAMILIES if name != "modernbert"]  # which other tests train


def steps_of_all(steps: int):
    from megatron_detour.training.engine import start_distributed

    config = run_config(tensor=2, sequence=True, micro=2)
    state, _ = start_distributed(config)
    return {name: steps_with(config, state, steps, name) for name in OTHERS}


def test_zero2_steps_equal_plain_torch(tmp_path):
    """Two tensor ranks with sequence parallelism, two data-parallel ones."""
    results = run_ranks(4, "tests.training.test_all_families:steps_of_all", tmp_path, 1)
    for name in OTHERS:
        norms, expected = plain_steps(DEFAULT.name, 1, name)
        for of_rank in results:
            assert of_rank[name][0] == pytest.approx(norms, rel=ROUNDING)
        found = results[0][name][1]
        for bias in [each for each in expected if each.endswith("key.bias")]:
            # It moves all scores of a query alike: its gradient is rounding, which Adam makes a step of.
            momentum = found.states["exp_avg"]
            assert momentum[bias].abs().max() <= ROUNDING * momentum[bias.replace("bias", "weight")].abs().max()
            assert (found.weights[bias] - expected[bias][0]).abs().max() <= 2 * LEARNING_RATE
            for by_name in (found.weights, found.steps, expected, *found.states.values()):
                del by_name[bias]
        # Without a norm after the embedding, rounding grows with the residual stream: in fp32 gradients are 3e-5 of the
        # greatest from those in fp64, ModernBERT's 2e-6.
        check_state(found, expected, DEFAULT.states, 1, slack=10.0 if name == "eurobert" else 1.0)


IN_ONE_CODE = ["camembert", "roberta", "xlm-roberta"]  # which differ from bert in names and positions


@pytest.mark.parametrize(
    "family", ["bert", "eurobert", *(pytest.param(name, marks=pytest.mark.slow) for name in IN_ONE_CODE)]
)
def test_a_run_is_resumed_on_other_ranks_frozen_and_released(family, corpus, tmp_path):
    """The whole run at TP2; its end again from the middle on two data-parallel ranks; then transformers' logits."""
    path = write_run_file(tmp_path / "run.yaml", corpus.prefix, corpus.tokenizer)
    described = yaml.safe_load(path.read_text())
    described["model"]["config"] = {"num_attention_heads": 4} | OWN[family] | SIZES | {"model_type": family}
    for key in ("pad_token_id", "cls_token_id", "bos_token_id"):  # the tokenizer's
        described["model"]["config"].pop(key, None)
    path.write_text(yaml.safe_dump(described))
    whole = finished(tmp_path / "whole", path, Setup(2, 2))
    middle = PHASE_ENDS[0] + 1
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for checkpoint in store.find_checkpoints(tmp_path / "again" / "checkpoints"):
        if store.step_of(checkpoint) > middle:
            shutil.rmtree(checkpoint)
    again = finished(tmp_path / "again", path, Setup(2, 1))
    for step in range(middle + 1, PHASE_ENDS[-1] + 1):
        assert again[step]["loss"] == pytest.approx(whole[step]["loss"], rel=1e-5), step

    before, after = (weights_at(tmp_path / "whole", step) for step in (PHASE_ENDS[0], PHASE_ENDS[1]))
    shape = read_shape(Source(str(latest(tmp_path / "whole"))).config(), family)
    frozen = shape.names_of(("embeddings", "layers.0"))
    assert {name for name in before if torch.equal(before[name], after[name])} == frozen

    export(str(tmp_path / "whole"), str(tmp_path / "out"), "fp32")  # compares logits with transformers'
    from transformers import AutoModelForMaskedLM

    opened = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert type(opened).__name__ == FAMILIES[family].architecture()
    ours = load_model(Source(str(tmp_path / "out")), shape)
    ids = torch.arange(5, 45)
    with torch.no_grad():
        theirs = opened(input_ids=ids[None]).logits[0]
        difference = (ours.logits(ids, torch.arange(40), (40,)) - theirs).abs().max()
    assert difference < 1e-5 * theirs.abs().max()


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "max_position_embeddings": 258}
GENTLE = [f"phases.{name}.learning_rate.peak=2e-4" for name in ("warm", "detour", "decay")]
GENTLE += ["phases.decay.learning_rate.end=2e-5", "guards.spikes=report", "checkpoint.keep=20"]
GENTLE += ["validation.corpora=[]", "batch.micro_sequences=1", "checkpoint.every=1 steps"]


def finished(folder: Path, run_file: Path, setup: Setup) -> dict[int, dict]:
    """Runs to the end; the records by step."""
    session = begin(folder, run_file, setup, folder.with_suffix(".log"), overrides=GENTLE, NO_REPORT="1")
    assert set(session.wait()) == {0}, session.output()[-4000:]
    return {record["step"]: record for record in read_metrics(folder / "metrics.jsonl")}


def latest(folder: Path) -> Path:
    return store.latest(folder / "checkpoints")


def weights_at(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(store.checkpoint_folder(folder / "checkpoints", step) / "model.safetensors")
