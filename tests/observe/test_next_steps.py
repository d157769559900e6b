"""The commands that a finished run prints are commands that this project has."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from megatron_detour.commands.main import COMMANDS, main
from megatron_detour.observe.next_steps import next_commands


def commands(control: bool) -> dict[str, list[str]]:
    folder = Path("runs/my notes")
    lines = next_commands(folder, folder / "checkpoints" / "step-00000006", control).splitlines()
    assert lines[0] == "next:"
    return {name: shlex.split(command) for name, command in (line.split(maxsplit=1) for line in lines[1:])}


def test_they_name_programs_and_options_that_are_there() -> None:
    found = commands(control=True)
    assert list(found) == ["convert", "evaluate", "control", "compare"]
    for program, command, *_ in found.values():
        assert program == "megatron-detour" and command in COMMANDS
    assert found["convert"][-3:] == ["runs/my notes/checkpoints/step-00000006", "--output", "models/my notes"]
    assert found["compare"][2:4] == ["runs/my notes-control", "runs/my notes"]
    assert found["control"][2] == "runs/my notes/run.yaml" and found["control"][-2:] == ["--control", "--launch"]


@pytest.mark.parametrize("name", ["convert", "evaluate", "control", "compare"])
def test_their_options_are_in_the_help(name: str, capsys) -> None:
    _, command, *words = commands(control=True)[name]
    with pytest.raises(SystemExit):
        main([command, "--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert {word for word in words if word.startswith("--")} <= known


def test_a_run_without_a_causal_phase_has_no_control() -> None:
    assert list(commands(control=False)) == ["convert", "evaluate"]
