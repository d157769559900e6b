"""docs/planning.md says what the commands take and answer."""

from __future__ import annotations

import re

from megatron_detour.commands.main import COMMANDS, main
from tests.harness import ROOT

PAGE = (ROOT / "docs/planning.md").read_text(encoding="utf-8")


def test_flags_are_the_commands(capsys):
    helps = ""
    for name in COMMANDS:
        try:
            main([name, "--help"])
        except SystemExit:
            helps += capsys.readouterr().out
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", PAGE))
    assert len(flags) >= 7
    assert [flag for flag in flags if flag not in helps] == []


def test_the_example_is_what_the_plan_answers(capsys, monkeypatch, tmp_path):
    """All of its lines but that of the disk, whose free bytes are the machine's."""
    monkeypatch.chdir(tmp_path)
    main(["plan", str(ROOT / "examples/recipes/french_base_10b.yaml"), "--gpus", "4", "--rate", "203000"])
    answer = capsys.readouterr().out.splitlines()
    example = next(block for block in re.findall(r"```\n(.*?)```", PAGE, re.S) if block.startswith("model "))
    lines = [line for line in example.splitlines() if not line.startswith("disk")]
    assert len(lines) > 25
    assert [line for line in lines if line not in answer] == []
