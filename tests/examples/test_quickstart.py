"""examples/quickstart.sh on a corpus of the user's: every step of the path, with a few training steps."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import pytest

from tests.conftest import sentences, write_jsonl
from tests.harness import ROOT, environment

pytestmark = pytest.mark.integration

SHORT = [f"phases.{name}.tokens=2 steps" for name in ("mlm", "detour", "decay")]


def quickstart(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(ROOT / "examples" / "quickstart.sh"), *arguments],
        env=environment() | {"VOCABULARY": "400"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_a_corpus_of_the_user_becomes_a_model(tmp_path):
    rng = random.Random(5)
    write_jsonl(tmp_path / "mine.jsonl", [sentences(rng, rng.randint(1, 8)) for _ in range(400)])
    arguments = ("mine.jsonl", *SHORT, "phases.mlm.learning_rate.warmup=0")
    first = quickstart(tmp_path, *arguments)
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-3000:]
    work = tmp_path / "runs" / "quickstart-mine"
    assert len((work / "data" / "heldout.jsonl").read_text().splitlines()) == 8
    assert len((work / "data" / "train.jsonl").read_text().splitlines()) == 392
    assert json.loads((work / "model" / "config.json").read_text())["model_type"] == "modernbert"
    assert "right:" in first.stdout and str(Path("runs/quickstart-mine/run/report.html")) in first.stdout
    written = (work / "model" / "model.safetensors").stat().st_mtime_ns

    again = quickstart(tmp_path, *arguments)
    assert again.returncode == 0, again.stderr[-3000:]
    assert (work / "model" / "model.safetensors").stat().st_mtime_ns == written

    longer = quickstart(tmp_path, *arguments[:-2], "phases.decay.tokens=3 steps", arguments[-1])
    assert longer.returncode == 1 and "phases.decay.tokens is" in longer.stderr

    write_jsonl(tmp_path / "mine.jsonl", ["quite another text"] * 60)
    other = quickstart(tmp_path, *arguments)
    assert other.returncode == 1 and "mine.jsonl has changed" in other.stderr


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.jsonl", None, "no such file"),
        ("a.csv", "x", "must end in .jsonl"),
        ("small.txt", "one\ntwo\n", "VOCABULARY=N"),
        ("broken.jsonl", '{"text": "a"}\n' * 60 + "{\n", "broken.jsonl, line 61: invalid JSON"),
        ("key.jsonl", '{"note": "a"}\n' * 60, "TEXT_KEY"),
    ],
)
def test_what_is_no_corpus_is_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    result = quickstart(tmp_path, name)
    assert result.returncode == 1
    assert message in result.stderr


def test_arguments_are_checked_before_anything_is_made(tmp_path):
    (tmp_path / "a.txt").write_text("text\n" * 100)
    for arguments, message in (
        (["a.txt", "phases.dekay.tokens=1k"], "dekay"),
        (["batch.sequences=4", "a.txt"], "the corpus comes first"),
        (["a.txt", "folder=elsewhere"], "runs/quickstart-a"),
    ):
        result = quickstart(tmp_path, *arguments)
        assert result.returncode == 1 and message in result.stderr, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert "VOCABULARY=N" in quickstart(tmp_path, "--help").stdout
