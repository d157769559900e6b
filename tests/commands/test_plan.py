"""`megatron-detour plan`: every recipe, its JSON, and all faults at once."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from megatron_detour.commands.main import main
from megatron_detour.config import load
from megatron_detour.errors import DetourError
from megatron_detour.forecast.forecast import forecast
from megatron_detour.plan import Plan
from tests.harness import ROOT

RECIPES = sorted((ROOT / "examples/recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.stem[:6] in ("englis", "french")], ids=lambda r: r.stem)
def test_the_papers_recipes_fill_the_papers_gpus(recipe):
    """auto chooses micro-batches of 65,536 tokens on four GPUs of 80 GB, and no change is advised."""
    config = load(recipe)
    result = forecast(config, Plan.from_config(config), 4, device="h100", gpu_memory=80)
    assert all(memory.fits(80) for memory in result.memory.values())
    assert {batch.tokens for batch in result.micro_batches.values()} == {65_536}
    assert result.advice is None


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_planned(recipe, capsys, monkeypatch, tmp_path):
    """Nothing of them is there: it is told as faults, and what does not depend on it is forecast all the same."""
    monkeypatch.chdir(tmp_path)
    assert main(["plan", str(recipe), "--gpus", "2"]) == 1
    out = capsys.readouterr().out
    raw = yaml.safe_load(recipe.read_text())
    for corpus in raw["data"]["corpora"]:
        assert f"fault: data.corpora: {corpus['prefix']}.manifest.json: no such corpus" in out
    assert re.search(r"model +\S+ ?.*M parameters", out)
    for section in ("time", "memory", "corpora", "disk"):
        assert re.search(rf"^{section} ", out + " ", re.M) or section in out.split()
    assert "note: memory" not in out and "unknown:" not in out


def test_json_says_everything(good_run, write_run, capsys):
    assert main(["plan", write_run(good_run), "--json", "--gpus", "4", "--rate", "1000"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["faults"] == [] and result["warnings"] == []
    assert (result["ranks"], result["plan"]["total_steps"]) == (4, 10)
    assert result["seconds"] == pytest.approx(10 * 8 * 128 / 4000)
    assert result["flops"] == sum(cost["flops"] for cost in result["costs"])
    assert result["costs"][0]["sampled"] is True
    for memory in result["memory"].values():
        assert memory["counted"] == sum(memory["parts"].values()) < memory["needed"]
        assert memory["fits"]["80"] is True
    assert result["readings"][0]["epochs"] == pytest.approx(10 * 8 * 128 / result["readings"][0]["tokens"])
    assert result["disk"]["needed"] > 12 * result["parameters"]


def test_a_good_run_file_is_told_to_be_good(good_run, write_run, capsys):
    assert main(["plan", write_run(good_run)]) == 0
    assert capsys.readouterr().out.rstrip().endswith("nothing here would stop the run")


@pytest.mark.parametrize(("gpu", "hint"), [("h10", "h100"), ("H1OO", "h100"), ("mi300", "mi300x"), ("abacus", None)])
def test_a_gpu_by_almost_its_name(good_run, write_run, capsys, gpu, hint):
    main(["plan", write_run(good_run), "--gpu", gpu])
    out = " ".join(capsys.readouterr().out.split())
    meant = f" (did you mean {hint!r}?)" if hint else ""
    assert f"time: the peak of {gpu!r} is unknown{meant}; set a measured rate" in out


def test_the_control_is_planned(good_run, write_run, capsys):
    path = write_run(good_run)
    for words in (["--control"], ["--control", "mlm=0.4"]):
        assert main(["plan", *words, path, "seed=3"]) == 0
        assert f"MLM, {'40' if words[1:] else '30'}% masked" in capsys.readouterr().out
    assert main(["plan", path, "--control", "seed=3"]) == 0
    assert "small-control: " in capsys.readouterr().out
    with pytest.raises(DetourError, match="--control clm=1: write it as"):
        main(["plan", path, "--control=clm=1"])


def test_ten_faults_of_form_and_sense_at_once(good_run, write_run, capsys):
    """Each fault names its key and its value; those that say what is wanted need no other remedy."""
    good_run |= {"seed": -3, "z_los": 0.1, "optimizer": {"clip": "much"}, "compute": {"kernels": "tritn"}}
    good_run["batch"] = {"sequences": 8, "micro_sequences": -3}
    good_run["data"]["corpora"][0]["weight"] = 0
    good_run["validation"]["mask_rate"] = 1.5
    good_run["phases"][0] |= {"mask_rate": 0.3, "tokens": "many"}
    good_run["phases"][1]["learning_rate"] = {"peak": -1.0}
    expected = [  # key, value, remedy
        ("seed", "-3", "must be at least 0 and below 2,147,483,648"),
        ("z_los", "", "did you mean 'z_loss'"),
        ("optimizer.clip", "'much'", "must be a number"),
        ("compute.kernels", "'tritn'", "did you mean 'triton'"),
        ("batch.micro_sequences", "-3", "must be above 0"),
        ("data.corpora.0.weight", "0", "must be above 0"),
        ("validation.mask_rate", "1.5", "must be above 0 and below 1"),
        ("phases.0.mask_rate", "", "remove it"),
        ("phases.0.tokens", "'many'", "such as 50B"),
        ("phases.1.learning_rate.peak", "-1", "must be above 0"),
    ]
    path = write_run(good_run)
    with pytest.raises(DetourError) as refusal:
        main(["plan", path])
    assert main(["plan", path, "--json"]) == 1
    faults = json.loads(capsys.readouterr().out)["faults"]
    check_faults(faults, expected)
    assert [fault in str(refusal.value) for fault in faults] == [True] * 10


def test_ten_faults_of_what_is_not_there_and_does_not_fit_at_once(good_run, write_run, corpus, tmp_path, capsys):
    """All that a start would refuse one after the other."""
    zero = tmp_path / "ds.json"
    zero.write_text(json.dumps({"zero_optimization": {"stage": 3}, "train_batch_size": 8, "fp16": {"enabled": True}}))
    (tmp_path / "model/model.safetensors").unlink()
    good_run["deepspeed"] = str(zero)
    good_run["data"] = {"corpora": [{"prefix": "nowhere"}], "sequence_length": 512}
    good_run["parallel"] = {"tensor": 5}
    good_run["phases"][0]["freeze"] = ["embeddings", "layers.3-7"]
    good_run["validation"] = {"corpora": [{"prefix": "elsewhere"}]}
    expected = [
        ("model.start", "the folder has no model.safetensors", "download the model again"),
        (str(zero), "train_batch_size", "remove train_batch_size"),
        (str(zero), "stage is 3", "set 2"),
        (str(zero), "fp16", "use bf16 or fp32"),
        ("parallel.tensor", "5 does not divide the model's attention heads, 4", "possible: 1, 2, 4"),
        ("parallel.tensor", "5 does not divide the model's intermediate size, 48", "possible: 1, 2, 4"),
        ("data.sequence_length", "512", "set it to 256 or less"),
        ("phases.detour.freeze", "'layers.3-7'", "0 to 4"),
        ("data.corpora", "nowhere", "build it with"),
        ("validation.corpora", "elsewhere", "build it with"),
    ]
    assert main(["plan", write_run(good_run), "--gpus", "10", "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    check_faults(result["faults"], expected)
    assert main(["plan", write_run(good_run), "--gpus", "10"]) == 1
    out = capsys.readouterr().out
    assert all(f"fault: {fault}" in out for fault in result["faults"])
    assert out.rstrip().endswith("10 faults would stop the run")


def check_faults(faults: list[str], expected: list[tuple[str, str, str]]) -> None:
    assert len(faults) == len(expected)
    for key, value, remedy in expected:
        mine = [fault for fault in faults if fault.startswith(f"{key}:") and value in fault]
        assert len(mine) == 1, (key, value, faults)
        assert re.search(remedy, mine[0]), (remedy, mine[0])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["phases.decay.mask_rate=0.7"], "phases.decay.mask_rate: 0.7 is outside"),
        (["phases.detour.learning_rate.warmup=6 steps"], "6,144 tokens are 75% of the phase's 8,192"),
        (["phases.decay.learning_rate={peak: 1.0e-3}"], "phases.decay.learning_rate: stays at 0.001"),
        (["phases.decay.objective=clm", "phases.decay.mask_rate=null"], "phases: the last one, decay, trains CLM"),
        (["phases.decay.optimizer_state=reset"], "set learning_rate.warmup"),
        (["validation.sequences=2000"], "validation.sequences: 2000 x 128 tokens exceed the"),
        (["validation.corpora=[]"], "hold out documents with megatron-detour"),
        (["phases.detour.tokens=200k"], "epochs repeated text is less useful"),
    ],
)
def test_warnings_do_not_stop_a_run(good_run, write_run, capsys, overrides, expected):
    assert main(["plan", write_run(good_run), *overrides]) == 0
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert expected in warning


def test_what_does_not_fit_is_told_what_to_change_first(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    large = str(ROOT / "examples/recipes/english_large_50b.yaml")

    def answer(*words: str) -> str:
        main(["plan", large, "--gpus", "8", *words])
        return capsys.readouterr().out

    assert "fits 80 GB" in answer()
    chosen = "micro-batch: 1 x 8,192 tokens (auto: the most that fits 16 GB); a run chooses anew at its start"
    assert chosen in answer("--gpu-memory", "16")
    given = answer("--gpu-memory", "16", "batch.micro_sequences=8")
    assert "does not fit 16 GB" in given and "with batch.micro_sequences=1 it fits" in given
    assert "with compute.recompute=selective it fits" in answer("--gpu-memory", "12", "batch.micro_sequences=1")
    assert "are not enough: set parallel.tensor=2" in answer("--gpu-memory", "4")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["plan"], "required: RUN.yaml"),
        (["plan", "x.yaml", "--gpus", "0"], "--gpus: must be at least 1, not 0"),
        (["plan", "x.yaml", "--mfu", "35"], "--mfu: must be above 0 and at most 1, not 35.0"),
        (["plan", "x.yaml", "--rate", "fast"], "--rate: must be a number, not 'fast'"),
        (["plan", "x.yaml", "--rate", "5", "--mfu", "0.3"], "not allowed with"),
        (["plan", "nowhere.yaml"], "nowhere.yaml: no such run file"),
        (["paln"], "invalid choice"),
    ],
)
def test_wrong_arguments_are_told_in_a_sentence(words, expected):
    with pytest.raises(DetourError, match=re.escape(expected)):
        main(words)
