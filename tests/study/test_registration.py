"""A study is registered before its first result; a later change is refused, or shown."""

from __future__ import annotations

import gzip
import json

import pytest
import yaml

from megatron_detour.commands.main import main
from megatron_detour.errors import DetourError
from megatron_detour.study.plan import read_study
from megatron_detour.study.records import REGISTRATION
from megatron_detour.study.registration import _OWN, _hash, register, registered
from tests.study.studies import write_study


def change(path, **keys):
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | keys))
    return read_study(path)


def test_a_changed_study_is_refused_or_amended(corpus, tmp_path):
    path = write_study(tmp_path, corpus)
    first = register(read_study(path))
    assert register(read_study(path)) == first
    changed = change(path, criteria={"helps": "detour > control on mean of tasks, p < 0.2"})
    with pytest.raises(DetourError, match=r"criteria.helps was .*0.05' and is .*0.2'"):
        register(changed)
    amended = register(changed, "the level was a misprint")
    assert amended["amendments"][0]["reason"] == "the level was a misprint"
    assert "criteria.helps was" in amended["amendments"][0]["changes"][0]
    assert (amended["registered"], amended["sha256"]) == (first["registered"], first["sha256"])
    assert register(changed) == amended
    damage(tmp_path / "study" / REGISTRATION, "detour > control on loss")
    with pytest.raises(DetourError, match="changed since it was written"):
        register(changed)


def damage(path, criterion):
    content = json.loads(path.read_text())
    content["study"]["criteria"]["helps"] = criterion
    path.write_text(json.dumps(content))


def test_a_registration_after_the_results_is_refused(corpus, tmp_path):
    study = read_study(write_study(tmp_path, corpus))
    register(study)
    (study.folder / REGISTRATION).unlink()
    (study.folder / "jobs").mkdir()
    with pytest.raises(DetourError, match=r"has jobs and no registration\.json"):
        register(study)


def test_changed_validation_is_a_change_and_facts_of_later_versions_are_none(corpus, tmp_path):
    path = write_study(tmp_path, corpus)
    study = read_study(path)
    register(study)
    run = yaml.safe_load((tmp_path / "run.yaml").read_text())
    run["validation"]["sequences"] += 1
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    with pytest.raises(DetourError, match=r"facts\.validation\.sequences was"):
        register(read_study(path))
    file = study.folder / REGISTRATION
    earlier = json.loads(file.read_text())
    del earlier["facts"]["validation"]
    file.write_text(json.dumps(earlier | {"sha256": _hash({k: v for k, v in earlier.items() if k not in _OWN})}))
    assert register(read_study(path))["facts"] == earlier["facts"]


def test_other_versions_are_no_change(corpus, tmp_path, monkeypatch):
    study = read_study(write_study(tmp_path, corpus))
    first = register(study)
    assert first["facts"]["versions"].keys() == {"megatron-detour", "torch", "transformers", "deepspeed"}
    monkeypatch.setattr("megatron_detour.study.registration.installed_versions", lambda: {"torch": "99.0"})
    assert register(study) == first


def test_what_would_stop_a_study_late_is_refused_first(corpus, tmp_path):
    texts = {"files": [str(corpus.jsonl)], "count": 10_000}
    for number, (analyses, why) in enumerate((
        ({"drift": {"texts": texts}}, "fewer than the 10,000 of a draw"),
        ({"needle": {"files": texts["files"]}}, "the longest input is 256 tokens"),
        ({"needle": {"files": texts["files"], "options": {"lengths": [224], "examples": 41}}}, "give at least 42"),
        ({"transplants": {"task": "small_multi_label"}}, "a task of type classification, not multi-label"),
    )):  # fmt: skip
        (tmp_path / str(number)).mkdir()
        study = read_study(write_study(tmp_path / str(number), corpus, analyses=analyses, criteria={}))
        with pytest.raises(DetourError, match=why):
            register(study)
        assert not study.folder.exists()


def test_changed_data_is_a_change(corpus, tmp_path):
    path = write_study(tmp_path, corpus)
    register(read_study(path))
    test = next((tmp_path / "tasks" / "small_classification").glob("test.jsonl*"))
    text = gzip.decompress(test.read_bytes()) if test.suffix == ".gz" else test.read_bytes()
    test.unlink()
    (test.parent / "test.jsonl").write_bytes(text.partition(b"\n")[2])
    with pytest.raises(DetourError, match=r"facts\.tasks"):
        register(read_study(path))


def test_changed_texts_of_an_analysis_are_a_change(corpus, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_bytes(corpus.jsonl.read_bytes())
    drift = {"texts": {"files": [str(texts)], "count": 20}, "noise": "control2"}
    path = write_study(tmp_path, corpus, analyses={"drift": drift})
    register(read_study(path))
    texts.write_bytes(texts.read_bytes() * 2)
    with pytest.raises(DetourError, match=r"facts\.texts"):
        register(read_study(path))


def test_a_single_job_of_a_changed_study_is_refused(corpus, tmp_path):
    path = write_study(tmp_path, corpus)
    register(read_study(path))
    change(path, seeds=[1, 3])
    with pytest.raises(DetourError, match="has changed since"):
        main(["study", str(path), "--job", "train/detour-s1"])
    assert not (tmp_path / "study" / "runs").exists()


def test_where_it_runs_is_no_change(corpus, tmp_path):
    path = write_study(tmp_path, corpus)
    first = register(read_study(path))
    assert register(change(path, ranks=2)) == first


def test_an_edited_registration_is_refused(corpus, tmp_path):
    study = read_study(write_study(tmp_path, corpus))
    register(study)
    damage(study.folder / REGISTRATION, "detour > control on loss")
    with pytest.raises(DetourError, match="changed since it was written"):
        registered(study.folder)
