"""Files, commands, flags and keys named in the README and docs/ exist."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
from functools import cache

import pytest

from megatron_detour.commands.main import COMMANDS, main
from megatron_detour.config import load
from tests.harness import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"(?:(?:tools|examples)/\w+\.(?:py|sh)|megatron-detour [a-z]+[\w-]*)[^\n`|]*(?:\\\n[^\n`]*)*")
WITH_SUBCOMMANDS = (
    "tools/benchmark.py",
    "tools/evaluate.py",
    "tools/preprocess_data.py",
    "evaluate",
    "preprocess",
    "analyze",
    "study",
)
DEFAULTS = {
    "tools/evaluate.py": " run",
    "evaluate": " run",
    "analyze": " drift",
    "study": " run",
}  # the default subcommand
TOOLS = sorted((ROOT / "tools").glob("*.py"))


@cache
def help_of(script: str) -> str:
    """The help of a script or subcommand, printed by this process: libraries take seconds to load."""
    script, *subcommand = script.split()
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [str(ROOT / script), *subcommand, "--help"])
        with pytest.raises(SystemExit) as ended:
            if script in COMMANDS:
                main([script, *subcommand, "--help"])
            source = (ROOT / script).read_text(encoding="utf-8")  # Python runs the Python half of an example
            exec(compile(source, script, "exec"), {"__name__": "__main__", "__file__": str(ROOT / script)})
    assert not ended.value.code
    printed.seek(0)
    return printed.read()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    text = page.read_text()
    named = re.findall(r"\b(?:tools|examples|docs|ds_configs|megatron_detour|tests)/[\w./-]*\w", text)
    written = re.findall(r"^(?:Save it as )?`(\S+\.py)`[:,]", text, re.MULTILINE)  # by who follows the page
    assert [name for name in named if not (ROOT / name).exists() and name not in written] == []


def test_flags_in_the_pages_are_flags_of_the_tools():
    checked = 0
    for page in PAGES:
        for command in COMMAND.findall(page.read_text()):
            script, *subcommand = command.removeprefix("megatron-detour ").split()[:2]
            assert "/" in script or script in COMMANDS, f"{page.name}: {command}"
            if script in WITH_SUBCOMMANDS and subcommand and not subcommand[0].startswith("-"):
                script += f" {subcommand[0]}"
            script += DEFAULTS.get(script, "")
            if script == "examples/quickstart.sh":
                continue
            for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", command):
                assert flag in help_of(script), f"{page.name}: {script} {flag}"
                checked += 1
    assert checked >= 60


def test_the_readme_lists_every_subcommand():
    listed = re.search(r"^megatron-detour ([\w|-]+)$", (ROOT / "README.md").read_text(), re.MULTILINE)[1]
    assert listed.split("|") == [*COMMANDS]


def test_overrides_in_the_readme_are_keys_of_the_run_file():
    block = re.search(r"^notes=\((.*?)\)$", (ROOT / "README.md").read_text(), re.S | re.M)
    overrides = shlex.split(block[1])
    config = load(ROOT / "examples/recipes/english_base_10b.yaml", overrides)
    assert (config.folder, config.model.start) == ("runs/notes", "models/ModernBERT-base")
    assert [corpus.prefix for corpus in config.data.corpora + config.validation.corpora] == [
        "data/notes",
        "data/notes.heldout",
    ]
    assert config.phases[0].tokens == 2_000_000_000


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_tools_are_thin(tool):
    lines = [line for line in tool.read_text().splitlines() if line.strip()]
    assert len(lines) < 65
    assert "usage:" in help_of(f"tools/{tool.name}")
