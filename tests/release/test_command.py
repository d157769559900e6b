"""`megatron-detour convert`, the upload, and the commands of docs/release.md."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from megatron_detour.commands import convert as command
from megatron_detour.commands.main import main
from megatron_detour.errors import DetourError
from megatron_detour.evaluation.models import fingerprint
from megatron_detour.release import hub
from tests.evaluation.evaluations import MadeUp, make_evaluation
from tests.harness import ROOT
from tests.release.made import make_run
from tests.release.test_card import table

pytestmark = pytest.mark.integration

PAGE = (ROOT / "docs/release.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("command") / "run", corpus, steps=(4, 6))


@pytest.fixture
def convert() -> Callable[[list[str]], None]:
    """The command, in this process."""
    return lambda words: main(["convert", *words])


@dataclass
class Api:
    """Stands in for huggingface_hub.HfApi: keeps what it is asked for, or fails."""

    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    fault: Exception | None = None

    def create_repo(self, repo_id: str, **options: Any):
        from huggingface_hub import RepoUrl

        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, **options: Any) -> None:
        if self.fault:
            raise self.fault
        there = sorted(path.name for path in Path(options["folder_path"]).iterdir())
        self.calls.append(("upload_folder", {**options, "there": there}))


@pytest.fixture
def api(monkeypatch) -> Api:
    made = Api()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: made)
    return made


def test_nothing_is_uploaded_unless_asked(convert, run, tmp_path, api, capsys):
    convert(["--checkpoint", str(run), "--output", str(tmp_path / "model"), "--language", "en", "--license", "mit"])
    assert api.calls == []
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and "model: step 6 of 6, logits match transformers within " in said[0]


def test_an_upload_is_of_the_complete_folder(convert, run, tmp_path, api, capsys):
    where = ["--checkpoint", str(run), "--output", str(tmp_path / "model")]
    convert([*where, "--push-to-hub", "hospital/notes", "--private"])
    (made, uploaded) = api.calls
    assert made == ("create_repo", {"repo_id": "hospital/notes", "private": True, "exist_ok": True})
    files = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert files <= set(uploaded[1]["there"]) and uploaded[1]["ignore_patterns"] == ["files.json"]
    assert (uploaded[1]["repo_id"], uploaded[1]["folder_path"]) == ("hospital/notes", tmp_path / "model")
    assert 'model="hospital/notes"' in (tmp_path / "model" / "README.md").read_text()
    assert capsys.readouterr().out.splitlines()[-1] == "uploaded to https://huggingface.co/hospital/notes"


def test_a_failed_upload_leaves_the_folder_and_says_how_to_go_on(convert, run, tmp_path, api):
    api.fault = ConnectionError("no route\nto the hub")
    with pytest.raises(DetourError) as raised:
        convert(["--checkpoint", str(run), "--output", str(tmp_path / "model"), "--push-to-hub", "hospital/notes"])
    assert "is complete, but was not uploaded to hospital/notes: no route to the hub; " in str(raised.value)
    assert f"hf upload hospital/notes {tmp_path / 'model'}" in str(raised.value)
    assert (tmp_path / "model" / "README.md").is_file()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--private"], "--private requires --push-to-hub"),
        (["--evaluation-model", "a"], "--evaluation-model requires --evaluation"),
        (["--push-to-hub", "a/b/c"], "--push-to-hub a/b/c: not a valid repository id"),
        (["--language", "english"], "--language: must be a language code .*not 'english'"),
        (["--base-model", "ModernBERT"], "--base-model: must be a hub id .*not 'ModernBERT'"),
        (["--text", "no.txt"], r"--text no\.txt: cannot be read"),
        (["--card-facts", "no.yaml"], r"--card-facts no\.yaml: cannot be read"),
    ],
)
def test_wrong_arguments_are_told_before_anything_is_done(convert, run, tmp_path, api, more, message):
    with pytest.raises(DetourError, match=message):
        convert(["--checkpoint", str(run), "--output", str(tmp_path / "model"), *more])
    assert not list(tmp_path.iterdir()) and api.calls == []


def test_the_name_in_an_evaluation():
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    given = ["--checkpoint", "a", "--output", "models/b", "--evaluation", "c"]
    for more, name in [([], "b"), (["--name", "d"], "d"), (["--name", "d", "--evaluation-model", "e"], "e")]:
        assert command.evaluated_name(parser.parse_args([*given, *more])) == name


def test_the_commands_of_the_page_run(convert, corpus, tmp_path, monkeypatch, api):
    """All that export, in their order; the scores are those of a made-up evaluation."""
    make_evaluation(tmp_path / "runs" / "scores", [MadeUp("hoc", "multi-label")], {"base": 0.5, "notes-bert": 0.8})
    make_run(tmp_path / "runs" / "notes", corpus, steps=(4, 6))
    facts = re.search(r"```yaml\n(.*?)```", PAGE, re.S)[1]
    (tmp_path / "facts.yaml").write_text(facts.replace("  notes:", f"  {Path(corpus.prefix).name}:"))
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^python tools/convert_to_hf\.py ((?:.*\\\n)*.*)$", PAGE, re.M)
    assert len(commands) == 4
    for line in commands:
        words = shlex.split(line.replace("\\\n", " "))
        convert(words)
        assert (Path(words[words.index("--output") + 1]) / "README.md").is_file()
    assert [name for name, _ in api.calls] == ["create_repo", "upload_folder"]
    (row,) = table(Path("models/notes-bert-scored/README.md").read_text(), "Evaluation")
    assert row["Seeds"] == "3" and 50 < float(row["Mean"]) < 100
    assert "Discharge notes" in Path("models/notes-bert-public/README.md").read_text()


def test_an_evaluation_without_the_model_is_told(convert, run, tmp_path):
    make_evaluation(tmp_path / "scores", [MadeUp("hoc", "multi-label", 9)], {"notes-bert": 0.8})
    where = ["--checkpoint", str(run), "--output", str(tmp_path / "notes-bart"), "--evaluation"]
    with pytest.raises(DetourError, match=r"no model 'notes-bart' \(did you mean 'notes-bert'\?\)"):
        convert([*where, str(tmp_path / "scores")])
    with pytest.raises(DetourError, match="nowhere"):
        convert([*where, str(tmp_path / "nowhere")])
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]


def test_scores_of_other_weights_are_refused(convert, run, tmp_path):
    """Those of a rounded export of the checkpoint are not, and those of a folder that is gone only with a warning."""
    where = ["--checkpoint", str(run), "--output"]
    convert([*where, str(tmp_path / "rounded")])
    shutil.copytree(tmp_path / "rounded", tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    weights["head.dense.weight"] = weights["head.dense.weight"] + 1
    save_file(weights, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    for name, message in (("rounded", None), ("other", r"whose head\.dense\.weight differs from"), ("gone", None)):
        output = tmp_path / f"scores-{name}"
        make_evaluation(output, [MadeUp("hoc", "multi-label", 9)], {name: 0.8})
        lines = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
        for line in lines:
            line["path"] = str(tmp_path / name)
            line["identity"]["model"] = "" if name == "gone" else fingerprint(tmp_path / name)
        (output / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        asked = [*where, str(tmp_path / f"card-{name}"), "--evaluation", str(output), "--evaluation-model", name]
        if message:
            with pytest.raises(DetourError, match=message):
                convert(asked)
        else:
            convert(asked)
            assert "protocol " in (tmp_path / f"card-{name}" / "README.md").read_text()


def test_a_repository_is_checked_without_the_network():
    for good in ("hospital/notes-bert", "notes"):
        hub.check_repository(good)
    for bad in ("a b", "a/b/c", "-a", ""):
        with pytest.raises(DetourError, match="use OWNER/NAME"):
            hub.check_repository(bad)
