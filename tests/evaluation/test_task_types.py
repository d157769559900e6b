"""Kinds of tasks: a new one is a file, as docs/extending.md says; reading needs no torch."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.evaluation.test_finetune import write_tiny_model
from tests.harness import ROOT, environment

SECTION = (ROOT / "docs/extending.md").read_text(encoding="utf-8").split("## A task type\n")[1].split("\n## ")[0]
(MODULE,) = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
(TASK,) = re.findall(r"```yaml\n(.*?)```", SECTION, re.DOTALL)
WORDS = ("no pain", "some pain", "a fever", "a fever of 38.5 °C", "une toux sèche")


@pytest.fixture
def extended(tmp_path) -> Path:
    """A copy of the package with the page's kind of task in it."""
    shutil.copytree(
        ROOT / "megatron_detour", tmp_path / "megatron_detour", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    (tmp_path / "megatron_detour/evaluation/task_types/grade.py").write_text(MODULE, encoding="utf-8")
    return tmp_path


def test_the_pages_kind_of_task_is_read_trained_scored_and_reported(extended, tokenizer_folder):
    model = write_tiny_model(extended / "model", tokenizer_folder)
    (extended / "severity.yaml").write_text(TASK)
    (extended / "severity").mkdir()
    rng = random.Random(0)
    for split, size in (("train", 60), ("dev", 20), ("test", 20)):
        grades = [rng.randrange(5) for _ in range(size)]
        lines = [json.dumps({"text": f"The patient has {WORDS[grade]}.", "grade": grade}) + "\n" for grade in grades]
        (extended / "severity" / f"{split}.jsonl").write_text("".join(lines))
    output = extended / "out"
    done = subprocess.run(
        [sys.executable, "tools/evaluate.py", "run", "--model", model, "--tasks", "severity.yaml", "--data", ".",
         "--output", output, "--seeds", "1", "--set", "learning_rate=3e-3", "batch=8", "epochs=12"],
        cwd=extended, env=environment() | {"PYTHONPATH": str(extended)}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = (output / "results.jsonl").read_text().splitlines()
    assert set(json.loads(line)["scores"]) == {"within_one", "accuracy"}
    (task,) = json.loads((output / "summary.json").read_text())["tasks"]
    assert task["metric"] == "within_one" and task["sanity"]["not_above"] == []
    assert task["scores"]["model"]["mean"] > task["sanity"]["chance"]["high"]
    assert "within one" in (output / "report.html").read_text(encoding="utf-8")


def test_tasks_and_results_are_read_without_torch():
    modules = "task, examples, results, task_types, report.load_results, finetuning.protocol"
    imports = "\n".join(f"import megatron_detour.evaluation.{name}" for name in modules.split(", "))
    code = f"import sys\n{imports}\nprint([name for name in ('torch', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
