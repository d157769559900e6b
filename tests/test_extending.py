"""docs/extending.md: its files, put into a copy of the package, are all that a new kind needs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from megatron_detour.checkpoint.store import checkpoint_folder
from tests.harness import ROOT, environment

PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
LOOK = """
import json, sys
import numpy as np
from pathlib import Path
from megatron_detour.config import load
from megatron_detour.forecast import forecast, plan_table
from megatron_detour.observe.compare import write_comparison
from megatron_detour.plan import Plan
from megatron_detour.release.export import export
from megatron_detour.tokenizer.vocabulary import load_vocabulary

run_file, folder, twin, out = sys.argv[1:]
config = load(run_file)
plan = Plan.from_config(config)
objective = config.phases[0].objective
vocabulary, tokens = load_vocabulary(config.model.tokenizer), np.arange(20, 220)
lengths, numbers = np.array([150, 50]), np.array([3, 4])
noisy, mlm = (kind.bind(vocabulary).apply(tokens, lengths, 17, numbers) for kind in (objective, plan.phases[1].objective.__class__(0.3)))
foreseen = forecast(config, plan, device="cpu")
page, text = write_comparison([Path(folder), Path(twin)], Path(out) / "compared")
export(folder, f"{out}/model", "fp32")
print(json.dumps({
    "table": plan_table(plan),
    "labels": [noisy.labeled.tolist(), noisy.labels.tolist()],
    "masked": [mlm.labeled.tolist(), mlm.labels.tolist()],
    "inputs": noisy.inputs.tolist(),
    "alone": objective.bind(vocabulary).apply(tokens[150:], lengths[1:], 17, numbers[1:]).inputs.tolist(),
    "special": vocabulary.special_ids,
    "faults": foreseen.faults,
    "flops": [cost.flops for cost in foreseen.costs],
    "compared": text,
}))
"""  # noqa: E501


def files(heading: str) -> dict[str, str]:
    """The Python files that a section names, each before its code block."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    return dict(re.findall(r"^`(\S+\.py)` in `megatron_detour/`:\n\n```python\n(.*?)```", section, re.M | re.S))


@pytest.fixture
def extended(tmp_path):
    """Copies the package and adds the files of a section, none of which is there; returns how to run Python on it."""

    def extend(heading: str):
        shutil.copytree(ROOT / "megatron_detour", tmp_path / "megatron_detour")
        for name, content in files(heading).items():
            assert not (ROOT / "megatron_detour" / name).exists()
            (tmp_path / "megatron_detour" / name).write_text(content, encoding="utf-8")

        def python(*arguments: str) -> str:
            command = [sys.executable, *arguments]
            there = environment() | {"PYTHONPATH": str(tmp_path)}
            done = subprocess.run(command, env=there, cwd=tmp_path, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
            return done.stdout

        return python

    return extend


def run_file(folder: Path, corpus, **changes) -> str:
    phase = {"tokens": "3 steps", "learning_rate": {"peak": 1e-2}}
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    content = {
        "name": "tiny",
        "folder": str(folder / "run"),
        "model": {"config": shape | {"max_position_embeddings": 128}, "tokenizer": str(corpus.tokenizer)},
        "data": {"corpora": [{"prefix": corpus.prefix}], "sequence_length": 64},
        "batch": {"sequences": 4, "micro_sequences": 2},
        "phases": [
            {"name": "detour", "objective": "clm", **phase},
            {"name": "decay", "objective": "mlm", "mask_rate": 0.15, **phase},
        ],
        "deepspeed": str(ROOT / "ds_configs/zero2_fp32_cpu.json"),
        "validation": {"corpora": [{"prefix": corpus.prefix}], "sequences": 4},
        "tensorboard": False,
        **changes,
    }
    content["phases"][0] |= content.pop("detour", {})
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


@pytest.mark.integration
@pytest.mark.slow
def test_an_objective_is_one_file(extended, corpus, tmp_path):
    """From the run file to the card: planned, forecast, trained, validated, reported, compared."""
    assert list(files("An objective")) == ["objectives/denoising.py"]
    python = extended("An objective")
    run = run_file(tmp_path, corpus, detour={"objective": "denoising", "mask_rate": 0.3})
    python("-m", "megatron_detour", "train", "--run-file", run)
    python("-m", "megatron_detour", "train", "--run-file", run, "--control")
    seen = json.loads(
        python("-c", LOOK, run, str(tmp_path / "run"), str(tmp_path / "run-control"), str(tmp_path)).splitlines()[-1]
    )
    assert "detour  Denoising, 30% masked" in seen["table"]
    assert seen["faults"] == [] and seen["flops"][0] > seen["flops"][1]  # more positions are labeled
    # The tokens of MLM, all replaced by ordinary ones, whatever document is beside theirs.
    assert seen["labels"] == seen["masked"] and seen["inputs"][150:] == seen["alone"]
    changed = {place for place in range(200) if seen["inputs"][place] != place + 20}
    assert 0.9 * len(seen["labels"][0]) < len(changed) and changed <= set(seen["labels"][0])
    assert not set(seen["special"]) & {seen["inputs"][place] for place in changed}
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["objective"] for record in records[1:]] == ["denoising"] * 3 + ["mlm"] * 3
    assert [record["mask_rate"] for record in records[1:]] == [0.3] * 3 + [0.15] * 3
    assert records[3]["val_denoising_loss"] < records[0]["val_denoising_loss"]
    assert "val_denoising_accuracy" in records[6] and "val_clm_loss" in records[6]
    twin = json.loads((tmp_path / "run-control/plan.json").read_text())
    assert [phase["objective"] for phase in twin["phases"]] == ["mlm", "mlm"]
    report = (tmp_path / "run/report.html").read_text()
    assert "Denoising loss" in report and "--denoising: #a3195b" in report and "denoising-text" in report
    assert "Denoising loss" in seen["compared"] and (tmp_path / "compared/validation.png").stat().st_size > 1_000
    card = (tmp_path / "model/README.md").read_text()
    assert "Denoising (30% masked) on" in card and "Denoising loss" in card


@pytest.mark.integration
@pytest.mark.slow
def test_an_optimizer_is_one_file(extended, corpus, tmp_path):
    """Planned, trained, resumed to the bit, named in the card; and in its place no other is resumed with."""
    assert list(files("An optimizer")) == ["optimizers/sgd.py"]
    python = extended("An optimizer")
    changes = {"optimizer": {"name": "sgd", "momentum": 0.8}, "checkpoint": {"every": "2 steps"}}
    run = run_file(tmp_path, corpus, **changes)
    planned = json.loads(python("-m", "megatron_detour", "plan", run, "--json"))
    assert planned["setting"]["optimizer_bytes"] == 8 and planned["faults"] == []
    train = ("-m", "megatron_detour", "train", "--run-file", run)
    python(*train)
    checkpoints = tmp_path / "run/checkpoints"
    final = checkpoints / "step-00000006"
    whole = {name: load_file(final / f"{name}.safetensors") for name in ("model", "optimizer")}
    for name, weight in whole["model"].items():
        assert whole["optimizer"][f"momentum.{name}"].shape == weight.shape
    for step in (4, 6):
        shutil.rmtree(checkpoints / f"step-{step:08d}")
    python(*train)
    for name, before in whole.items():
        after = load_file(final / f"{name}.safetensors")
        assert before.keys() == after.keys() and all((before[key] == after[key]).all() for key in before), name
    python("-m", "megatron_detour", "convert", "--checkpoint", str(final), "--output", str(tmp_path / "model"))
    assert "SGD with momentum 0.8, weight decay 0.05" in (tmp_path / "model/README.md").read_text()


OPEN = """
import json, sys
import torch
from pathlib import Path
from megatron_detour.checkpoint.huggingface import compare_with_transformers, load_model
from megatron_detour.checkpoint.source import Source
from megatron_detour.config import load
from megatron_detour.forecast import forecast
from megatron_detour.model.families import read_shape
from megatron_detour.plan import Plan
from megatron_detour.release.export import export

run_file, folder, out = sys.argv[1:]
config = load(run_file)
foreseen = forecast(config, Plan.from_config(config), device="cpu")
exported = export(folder, out, "fp32")
source = Source(out)
print(json.dumps({
    "faults": foreseen.faults,
    "parameters": foreseen.parameters,
    "difference": exported.difference,
    "again": compare_with_transformers(out, load_model(source, read_shape(source.config(), out))),
}))
"""


@pytest.mark.integration
def test_an_encoder_is_one_file(extended, corpus, tmp_path):
    """Planned, trained, interrupted, resumed, exported with logits as in transformers."""
    (name,) = files("An encoder")
    assert 40 <= files("An encoder")[name].count("\n") <= 70
    python = extended("An encoder")
    shape = {"model_type": "plain-modernbert", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "max_position_embeddings": 128}
    run = run_file(tmp_path, corpus, model={"config": shape, "tokenizer": str(corpus.tokenizer)})
    train = ("-m", "megatron_detour", "train", "--run-file", run)
    python(*train)
    folder = tmp_path / "run"
    first = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert first[-1]["val_mlm_loss"] < first[0]["val_mlm_loss"]
    last = checkpoint_folder(folder / "checkpoints", 6)
    weights = (last / "model.safetensors").read_bytes()
    shutil.rmtree(last)  # as if the run had ended after the first phase
    python(*train)
    assert (last / "model.safetensors").read_bytes() == weights
    seen = json.loads(python("-c", OPEN, run, str(folder), str(tmp_path / "model")).splitlines()[-1])
    layer = 4 * 32 * 32 + 2 * 32 * 48
    assert seen["parameters"] == 2 * layer + 400 * 32 + 32 * 32 + (2 * 2 + 2) * 32 + 400
    assert seen["faults"] == [] and max(seen["difference"], seen["again"]) < 1e-5
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("plain-modernbert", ["PlainModernBertForMaskedLM"])


@pytest.mark.integration
@pytest.mark.slow  # the same tests over one more family
def test_the_tests_of_families_hold_for_the_example(extended, tmp_path):
    """Its declared weights, operations, activations, and two tensor ranks against one."""
    python = extended("An encoder")
    shutil.copytree(ROOT / "tests", tmp_path / "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    chosen = {
        "tests/model/test_families.py": "",
        "tests/model/test_flops.py": "::test_torch_counts_as_many",
        "tests/forecast/test_memory.py": "::test_activations_are_what_a_model_keeps",
        "tests/parallel/test_tensor_parallel.py": "::test_outputs_loss_and_gradients_agree[2]",
    }
    said = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-rA", *map("".join, chosen.items()))
    assert "test_declared_weights_are_the_modules[1-plain-modernbert]" in said
    assert "test_outputs_loss_and_gradients_agree[2]" in said
