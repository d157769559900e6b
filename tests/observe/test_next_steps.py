"""The commands that a finished run prints are commands that this project has."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from megatron_detour.commands.main import COMMANDS
from megatron_detour.observe.next_steps import next_commands

ROOT = Path(__file__).parents[2]


def commands(control: bool) -> dict[str, list[str]]:
    folder = Path("runs/my notes")
    lines = next_commands(folder, folder / "checkpoints" / "step-00000006", control).splitlines()
    assert lines[0] == "next:"
    return {name: shlex.split(command) for name, command in (line.split(maxsplit=1) for line in lines[1:])}


def test_they_name_programs_and_options_that_are_there() -> None:
    found = commands(control=True)
    assert list(found) == ["convert", "evaluate", "control", "compare"]
    for program, *arguments in found.values():
        if program == "megatron-detour":
            assert arguments[0] in COMMANDS
        else:
            file = ROOT / arguments[0]
            assert file.is_file()
    assert "--checkpoint" in (ROOT / "megatron_detour/release/command.py").read_text()
    assert found["convert"][-3:] == ["runs/my notes/checkpoints/step-00000006", "--output", "models/my notes"]
    assert found["compare"][2:4] == ["runs/my notes-control", "runs/my notes"]
    assert found["control"][-2:] == ["runs/my notes/run.yaml", "--control"]


@pytest.mark.parametrize("name", ["convert", "evaluate"])
def test_their_options_are_in_the_help(name: str) -> None:
    sources = (ROOT / "megatron_detour" / part for part in ("release/command.py", "evaluation/command.py"))
    known = {option for file in sources for option in re.findall(r'"(--[a-z-]+)"', file.read_text())}
    assert {word for word in commands(control=True)[name] if word.startswith("--")} <= known


def test_a_run_without_a_causal_phase_has_no_control() -> None:
    assert list(commands(control=False)) == ["convert", "evaluate"]
