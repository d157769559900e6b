"""What all tools have in common."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.harness import ROOT

TOOLS = sorted((ROOT / "tools").glob("*.py"))


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_outside_the_environment_a_tool_says_how_to_get_it(tool):
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(tool)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: No module named")
    assert line.endswith("run `make install` and start this with .venv/bin/python")


def test_the_builders_help_shows_commands_and_flags():
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    for word in ("verify", "stats", "peek", "merge", "--whole-files", "--output-prefix"):
        assert f"  {word} " in shown or f"[{word}" in shown
