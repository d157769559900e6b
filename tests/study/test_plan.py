"""Reading a study: arms, layers by name, shared phases, criteria, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import yaml

from megatron_detour.config import load
from megatron_detour.errors import DetourError
from megatron_detour.evaluation.finetuning.protocol import load_protocol
from megatron_detour.preflight import Preflight
from megatron_detour.study.forecast import describe_cost
from megatron_detour.study.jobs import jobs_of, levels
from megatron_detour.study.plan import read_study
from tests.harness import ROOT
from tests.study.studies import ARMS, CRITERIA, write_study


@pytest.fixture
def study_file(corpus, tmp_path):
    return write_study(tmp_path, corpus)


def test_arms_are_the_run_file_with_their_changes(study_file):
    study = read_study(study_file)
    assert [run.name for run in study.runs[:4]] == ["detour-s1", "control-s1", "control2-s1", "decay_frozen-s1"]
    detour, control, second, frozen = study.runs[:4]
    assert [phase.objective.name for phase in detour.plan.phases] == ["mlm", "clm", "mlm"]
    assert [phase.objective.name for phase in control.plan.phases] == ["mlm", "mlm", "mlm"]
    assert (second.config.seed, second.config.data.order_seed) == (101, 1)
    assert [str(part) for part in frozen.config.to_dict()["phases"][2]["freeze"]] == ["embeddings", "layers.0"]


def test_an_arm_continues_the_arm_with_which_it_shares_most(study_file):
    study = read_study(study_file)
    forks = {run.arm: run.fork for run in study.runs if run.seed == 2}
    assert forks["detour"] is None
    assert (forks["control"].source.name, forks["control"].tokens) == ("detour-s2", study.runs[0].plan.phases[0].end)
    assert forks["control2"] is None  # other masks from the first step
    assert (forks["decay_frozen"].source.name, forks["decay_frozen"].step) == (
        "detour-s2",
        study.runs[0].plan.phases[1].last_step,
    )


def test_an_arm_of_another_precision_shares_nothing(corpus, tmp_path):
    half = {"set": {"deepspeed": str(ROOT / "ds_configs" / "zero2_bf16.json")}}
    study = read_study(write_study(tmp_path, corpus, arms={"detour": {}, "half": half}, analyses={}, criteria={}))
    assert study.run("half", 1).fork is None


def test_jobs_follow_what_they_need(study_file):
    study = read_study(study_file)
    jobs = jobs_of(study)
    names = [job.name for job in jobs]
    assert "analyses drift: 2 jobs" in describe_cost(study, jobs)
    assert "evaluate/control2-s1" not in names
    for job in jobs:
        assert all(names.index(need) < names.index(job.name) for need in job.needs)
    stages = levels(jobs)
    first = [f"train/{arm}-s{seed}" for seed in (1, 2) for arm in ("detour", "control2")]
    assert [job.name for job in stages[0]] == first
    assert sum(map(len, stages)) == len(jobs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {}}, "arms: give at least one arm"),
        ({"arms": {"start": {}}}, "arms.start: must be letters"),
        ({"arms": ARMS | {"x": {"set": {"phases.detour.tokns": 1}}}}, "arms.x: .*unknown key"),
        ({"arms": ARMS | {"x": {"set": {"phases.detour.freeze": ["layers.7"]}}}}, "arms.x: .*layers.7"),
        ({"arms": ARMS | {"x": {"set": {"validation.sequences": 3}}}}, "arms.x: validation.* are not those of detour"),
        ({"arms": ARMS | {"x": {"set": {"model.config.hidden_size": 64}}}}, "arms.x: model is not that of detour"),
        ({"criteria": {"a": "detour better than control"}}, "criteria.a: .* is not a criterion"),
        ({"criteria": {"a": "detuor > control on loss"}}, r"criteria.a: .*did you mean 'detour'"),
        ({"criteria": {"a": "detour > control"}}, "criteria.a: on None: compare arms on one of loss"),
        ({"criteria": {"a": "detour > control on loss, p < 2"}}, "criteria.a: p < 2: the level"),
        ({"criteria": {"a": "detour > control on loss by magic"}}, "by magic: unknown test"),
        (
            {"criteria": {"a": "detour > control on loss by bootstrap"}},
            "by bootstrap: a choice for tasks only; loss has",
        ),
        ({"criteria": {"a": "drift of low > 1 by finetuning"}}, "by finetuning: a choice for tasks only; a quantity"),
        ({"criteria": {"a": "detour > control2 on mean of tasks"}}, "control2 has `evaluate: false`"),
        ({"criteria": {"a": "detour < start on loss"}}, "start is not trained"),
        ({"criteria": {"a": "persistence of low > 1"}}, "the study has no analyses.persistence"),
        ({"criteria": {"a": "drift of bottom > 1"}}, "unknown region"),
        ({"criteria": {"a": "drift of low > detour"}}, "compare two arms, two quantities, or a quantity with a number"),
        ({"analyses": {"drift": {"texts": {"files": ["nothing.jsonl"]}}}}, "nothing.jsonl: no such file"),
        ({"analyses": {"transplants": {"task": "hoc"}}}, "transplants.task: must be one of evaluation.tasks: small"),
        ({"analyses": {"needle": {"files": ["x"], "of": ["detuor"]}}}, r"needle\.of\.0: 'detuor' is no arm"),
        ({"analyses": {"layers": {}}}, "analyses.layers: needs analyses.drift with noise"),
        ({"criteria": {"a": "detour > control on needle"}}, "criteria.a: on needle: compare arms on one of loss, mean"),
        ({"arms": ARMS | {"x": {"set": {"seed": 3}}}}, "arms.x.set: seed is set by the study"),
        ({"seeds": [1, 1]}, "seeds: must be a list without repetitions"),
        ({"analyses": {"drift": {"texts": {"files": ["x"]}, "noise": "none"}}}, "drift.noise: 'none' is no arm"),
    ],
)
def test_faults_name_their_key(corpus, tmp_path, changes, message):
    with pytest.raises(DetourError, match=message):
        read_study(write_study(tmp_path, corpus, **changes))


@pytest.mark.parametrize(
    ("noise", "changes"),
    [("detour", {}), ("other", {"control": 0.2, "seed_offset": 5}), ("other", {"control": 0.3})],
)
def test_noise_is_of_the_seed_alone(corpus, tmp_path, noise, changes):
    drift = {"texts": {"files": [str(corpus.jsonl)], "count": 20}, "noise": noise}
    with pytest.raises(DetourError, match=f"{noise} must differ from control in seed_offset alone"):
        read_study(write_study(tmp_path, corpus, arms=ARMS | {"other": changes}, analyses={"drift": drift}))


def test_needles_are_a_measure_of_the_arms_that_have_them(corpus, tmp_path):
    needle = {"files": [str(corpus.jsonl)], "of": ["detour", "control2"]}
    criteria = {"finds": "detour > control2 on needle, p < 0.05", "other": "detour > control on needle"}
    with pytest.raises(DetourError, match=r"criteria\.other: on needle: control is not in analyses\.needle\.of"):
        read_study(write_study(tmp_path, corpus, evaluation=None, analyses={"needle": needle}, criteria=criteria))
    del criteria["other"]
    study = read_study(write_study(tmp_path, corpus, evaluation=None, analyses={"needle": needle}, criteria=criteria))
    job = next(job for job in jobs_of(study) if job.name == "needle/s2")
    assert job.needs == ("train/detour-s2", "train/control2-s2")


def test_a_shallow_model_has_no_deep_layers(corpus, tmp_path):
    arms = {"detour": {}, "frozen": {"set": {"phases.detour.freeze": ["deep"]}}}
    path = write_study(tmp_path, corpus, arms=arms, analyses={}, criteria={})
    run = yaml.safe_load((tmp_path / "run.yaml").read_text())
    run["model"]["config"]["num_hidden_layers"] = 2
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    with pytest.raises(DetourError, match=r"arms\.frozen: .*freeze: a model with 2 layers has no deep layers"):
        read_study(path)


def test_a_phase_must_be_one_of_the_arms(corpus, tmp_path):
    persistence = {"texts": {"files": [str(corpus.jsonl)], "count": 20}, "phase": "decai"}
    with pytest.raises(DetourError, match="'decai' is no phase of detour after the first"):
        read_study(write_study(tmp_path, corpus, analyses={"persistence": persistence}, criteria={}))


def test_no_study_file(tmp_path):
    with pytest.raises(DetourError, match="no such study file"):
        read_study(tmp_path / "study.yaml")
    (tmp_path / "study.yaml").write_text("- a\n")
    with pytest.raises(DetourError, match="a study file is a YAML mapping"):
        read_study(tmp_path / "study.yaml")


def test_criteria_are_read_as_written(study_file):
    study = read_study(study_file)
    assert {name: criterion.text for name, criterion in study.criteria.items()} == CRITERIA
    assert study.criteria["helps"].level == 0.05
    assert study.criteria["loss"].level is None
    assert yaml.safe_load(study_file.read_text())["criteria"] == CRITERIA


def without_files(monkeypatch) -> None:
    """Let a model of 22 layers and its corpora be there."""
    shape = SimpleNamespace(layers=22)
    monkeypatch.setattr("megatron_detour.study.plan.Path.is_file", lambda path: True)
    monkeypatch.setattr("megatron_detour.study.plan.look", lambda model: SimpleNamespace(shape=shape))
    monkeypatch.setattr("megatron_detour.study.plan.preflight", lambda *_, **__: Preflight())


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "studies").rglob("*.yaml")), ids=lambda path: path.stem)
def test_the_studies_of_the_examples_are_whole(path, monkeypatch):
    """Without their models and corpora: every key, arm, layer name and criterion is read."""
    content = yaml.safe_load(path.read_text())
    if "arms" not in content:
        load_protocol(str(path)) if "defaults" in content else load(path)
        return
    without_files(monkeypatch)
    study = read_study(path)
    assert study.criteria
    assert len(study.runs) == len(study.config.arms) * len(study.config.seeds)


def test_the_papers_decay_sweep_trains_the_detour_once(monkeypatch):
    without_files(monkeypatch)
    study = read_study(ROOT / "examples" / "studies" / "paper_french_base.yaml")
    sweep = {run.arm: run for run in study.runs if run.arm.startswith("decay_")}
    assert {run.fork.source.name for run in sweep.values()} == {"detour-s17"}
    assert 2_000_000_000 <= sweep["decay_2b"].new_tokens < 2_010_000_000
    frozen = {run.arm: run.config.to_dict()["phases"] for run in study.runs}
    assert frozen["low_frozen"][0]["freeze"] == ["embeddings", "layers.0-7"]
    assert frozen["mid_frozen"][0]["freeze"] == ["layers.8-14"]
