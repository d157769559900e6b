"""`megatron-detour analyze`, end to end on tiny models: the files, the tables, the errors."""

from __future__ import annotations

import json
import random

import pytest
import yaml

from megatron_detour.analysis.drift import Drift
from megatron_detour.commands.main import main
from megatron_detour.config import load
from megatron_detour.errors import DetourError
from tests.analysis.twins import write_twin
from tests.conftest import sentences, write_jsonl
from tests.evaluation.small_tasks import write_small_tasks


@pytest.fixture(scope="module")
def place(tokenizer_folder, tmp_path_factory):
    """Models, texts and tasks in one folder."""
    folder = tmp_path_factory.mktemp("place")
    for name, noise in (("control", 0.0), ("second", 0.02), ("detour", 0.2)):
        write_twin(folder / name, tokenizer_folder, noise=noise)
    rng = random.Random(5)
    write_jsonl(folder / "texts.jsonl", [sentences(rng, rng.randint(1, 6)) for _ in range(60)])
    write_small_tasks(folder / "tasks")
    return folder


@pytest.fixture
def analyze(place, monkeypatch, capsys):
    """Calls the command in the folder; returns what it printed."""
    monkeypatch.chdir(place)

    def call(words: str) -> str:
        assert main(["analyze", *words.split()]) == 0
        return capsys.readouterr().out

    return call


@pytest.fixture
def drift_file(analyze, place):
    words = "--detour detour --control control --second-control second --corpus texts.jsonl --count 20"
    if not (place / "drift.json").exists():
        (place / "printed.txt").write_text(analyze(f"drift {words} --output drift.json"))
    return place / "drift.json"


def test_drift(drift_file, place):
    content = json.loads(drift_file.read_text())
    drift = Drift.from_json(content)
    assert drift.models == {"detour": "detour", "control": "control", "second_control": "second"} and drift.texts == 20
    assert len(drift.detour) == 3 and content["measurement"]["estimator"] == "linear"
    assert set(content["identities"]) == {"detour", "control", "second"}
    assert len(content["corpus"]["texts.jsonl"]) == 64 and content["versions"].keys() >= {"torch", "transformers"}
    printed = (place / "printed.txt").read_text()
    for layer in range(5):
        row = next(line.split() for line in printed.splitlines() if line.startswith(f"{layer} "))
        assert float(row[1]) == pytest.approx(drift.mean[layer], abs=1e-4) and len(row) == 6
        assert float(row[5]) == pytest.approx(drift.ratio[layer], rel=0.01)
    assert "low, 0-1" in printed and "deep, 4" in printed


def test_drift_is_the_default_and_the_estimator_a_choice(analyze, drift_file, place):
    words = "--detour detour --control control --corpus texts.jsonl --count 20 --output other.json"
    printed = analyze(f"{words} --draws 42 --estimator debiased")
    assert printed.split("\n")[0].split() == ["Layers", "1", "−", "CKA"]  # no noise, and no sd of one draw
    other = Drift.from_json(json.loads((place / "other.json").read_text()))
    assert other.noise is None and len(other.detour) == 1
    assert other.detour[0] != Drift.from_json(json.loads(drift_file.read_text())).detour[0]


def test_persistence(analyze, place):
    checkpoints = "--checkpoints 3_000_000=detour 1000000=second"
    printed = analyze(
        f"persistence --reference control {checkpoints} --corpus texts.jsonl --count 20 --draws 1 2 --output p.json"
    )
    content = json.loads((place / "p.json").read_text())
    assert content["tokens"] == [1_000_000, 3_000_000] and len(content["divergence"][0]) == 2
    rows = [line.split() for line in printed.splitlines() if line.strip().startswith(("1M", "3M"))]
    assert [float(row[4]) for row in rows] == pytest.approx(content["summary"]["regions"]["all"], abs=1e-4)


def test_transplant(analyze, place):
    printed = analyze("transplant --donor detour --recipient control --parts attention low --output moved")
    record = json.loads((place / "moved/transplant.json").read_text())
    assert record["parts"] == ["attention", "low"] and f"{record['parameters']:,} of {record['total']:,}" in printed
    assert (place / "moved/model.safetensors").is_file()


def test_probe(analyze, place):
    printed = analyze(
        "probe --model control other=detour --task tasks/small_classification.yaml --data tasks --layers 0 -1 "
        "--strengths 0.1 --output probe.json"
    )
    content = json.loads((place / "probe.json").read_text())["models"]
    assert list(content) == ["control", "other"] and content["other"]["layers"] == [0, 4]
    row = next(line.split() for line in printed.splitlines() if line.startswith("4 "))
    assert [float(cell) for cell in row[1:]] == [
        pytest.approx(100 * content[name]["scores"][1][0], abs=0.05) for name in content
    ]
    assert "most frequent label" in printed


def test_loss(analyze, place, good_run):
    (place / "held_out.yaml").write_text(yaml.safe_dump(good_run))
    printed = analyze("loss --model control other=detour --run held_out.yaml --output loss.json")
    content = json.loads((place / "loss.json").read_text())
    assert list(content["models"]) == ["control", "other"] and content["validation"]["sequences"] == 8
    for name, figures in content["models"].items():
        row = next(line.split() for line in printed.splitlines() if line.startswith(name))
        assert float(row[1]) == pytest.approx(figures["val_mlm_loss"], abs=1e-4)
        assert float(row[3]) == pytest.approx(figures["val_clm_loss"], abs=1e-4)
    assert content["models"]["control"] != content["models"]["other"]
    with pytest.raises(DetourError, match=r"run small: no validation\.corpora"):
        (place / "blind.yaml").write_text(yaml.safe_dump(good_run | {"validation": {}}))
        analyze("loss --model control --run blind.yaml --output x.json")


def test_needle(analyze, place):
    printed = analyze(
        "needle --model control --corpus texts.jsonl --lengths 224 --examples 42 --language fr --output needle.json"
    )
    content = json.loads((place / "needle.json").read_text())["models"]["control"]
    assert content["options"]["language"] == "fr" and content["options"]["learning_rate"] == 2e-5
    assert "224 tokens" in printed and "at the middle" in printed
    assert f"{100 * content['all']['accuracy']:.1f}" in printed


def test_layers(analyze, drift_file, place, good_run):
    (place / "run.yaml").write_text(yaml.safe_dump(good_run))
    words = "--model control --corpus texts.jsonl --threshold 1.5 --output layers.json"
    content = json.loads(drift_file.read_text())
    content["noise"] = [
        [each / ratio for each, ratio in zip(row, (9, 9, 9, 1, 1), strict=True)] for row in content["detour"]
    ]
    (place / "made_up.json").write_text(json.dumps(content))
    printed = analyze(f"layers --drift made_up.json {words} --run run.yaml --run-output new.yaml")
    found = json.loads((place / "layers.json").read_text())
    assert found["freeze"] == ["layers.3-4"] and found["gradients"].keys() == {"clm", "mlm"}
    assert "arm      proposed: {set: {phases.detour.freeze: [layers.3-4]}}" in printed
    assert "freeze   [layers.3-4]" in printed and "Layers 0 to 2 drift 9 to 9 times" in " ".join(printed.split())
    old, new = load(place / "run.yaml"), load(place / "new.yaml")
    assert new.phases[0].freeze == ("layers.3-4",) and new.phases[1] == old.phases[1]
    assert (new.name, new.folder) == ("small-proposed", f"{old.folder}-proposed")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("--detour no --control control --corpus texts.jsonl --output x.json", "^no: no such folder"),
        ("--detour detour --control control --corpus no.jsonl --output x.json", r"no\.jsonl"),
        ("--detour detour --control control --corpus texts.jsonl --output x.json", "60 documents, fewer than the 500"),
        ("--detour detour --control control --corpus texts.jsonl --output control", "control: a folder"),
        ("--detour detour --control control --corpus texts.jsonl --draws 1 1 --output x", "--draws: .*repetitions"),
        ("--detour detour --control control --corpus texts.jsonl --count 3 --output x", "at least 4"),
        ("transplant --donor detour --recipient control --parts lo --output x.json", "lo: no part of a model"),
        (
            "probe --model control --task tasks/small_similarity.yaml --data tasks --output x.json",
            "type classification",
        ),
        ("needle --model control --corpus texts.jsonl --output x.json", "the longest input is 256 tokens"),
        ("layers --drift no.json --output x.json", r"--drift no\.json: no such file"),
        ("layers --drift texts.jsonl --output x.json", "invalid JSON"),
        ("layers --drift control/config.json --output x.json", "not a result of megatron-detour analyze drift"),
        ("layers --drift no.json --run-output y.yaml --output x.json", "--run-output requires --run"),
        ("persistence --reference control --checkpoints detour --corpus texts.jsonl --output x", "give TOKENS="),
    ],
)
def test_errors_are_one_sentence_and_nothing_is_written(words, why, analyze, place):
    with pytest.raises(DetourError, match=why) as caught:
        analyze(words)
    assert "\n" not in str(caught.value)
    assert not (place / "x.json").exists() and not (place / "x").exists()
