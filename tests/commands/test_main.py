"""The console command: its entry, and the commands that only pass on."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import pytest

from megatron_detour import __version__
from megatron_detour.commands.main import COMMANDS, main
from megatron_detour.errors import DetourError
from tests.harness import ROOT, environment
from tests.observe.runs import make_run


def call(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "megatron_detour", *words]
    return subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)


def test_the_module_is_the_command():
    done = call("--version")
    assert (done.returncode, done.stdout.strip()) == (0, __version__)
    done = call("plan", "nowhere.yaml")
    assert (done.returncode, done.stderr) == (1, "error: nowhere.yaml: there is no such run file\n")


def test_the_console_script_is_the_same():
    from megatron_detour.commands.main import entry

    assert callable(entry)
    assert "megatron-detour = megatron_detour.commands.main:entry" in (ROOT / "setup.py").read_text()


def test_help_names_every_command():
    out = call("--help").stdout
    for name, (what, _) in COMMANDS.items():
        assert f"  {name:8} {what}" in out
        assert call(name, "--help").stdout.startswith(f"usage: megatron-detour {name}")


def test_compare_passes_folders_on(monkeypatch, capsys):
    asked = []

    def write_comparison(folders: list[Path], output: Path) -> tuple[Path, str]:
        asked.append((folders, output))
        return output / "comparison.html", "a table"

    stand_in = types.ModuleType("megatron_detour.observe.compare")
    stand_in.write_comparison = write_comparison
    monkeypatch.setitem(sys.modules, "megatron_detour.observe.compare", stand_in)
    assert main(["compare", "runs/a", "runs/b", "--output", "page"]) == 0
    assert asked == [([Path("runs/a"), Path("runs/b")], Path("page"))]
    out = capsys.readouterr().out
    assert out.startswith("a table\n") and out.endswith("page/comparison.html\n")


def test_report_writes_a_page(capsys, tmp_path):
    assert main(["report", str(make_run(tmp_path / "run"))]) == 0
    out = capsys.readouterr().out
    assert "val_mlm_loss" in out or "MLM loss" in out
    assert out.endswith("report.html\n")


def test_report_of_no_run(tmp_path):
    with pytest.raises(DetourError, match=r"plan\.json"):
        main(["report", str(tmp_path)])
