"""The console command: its entry, and the commands that only pass on."""

from __future__ import annotations

import re
import subprocess
import sys
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
    assert (done.returncode, done.stderr) == (1, "error: nowhere.yaml: no such run file or recipe\n")


def test_the_console_script_is_the_same():
    from megatron_detour.commands.main import entry

    assert callable(entry)
    assert "megatron-detour = megatron_detour.commands.main:entry" in (ROOT / "setup.py").read_text()


def test_help_names_every_command():
    out = call("--help").stdout
    for name, (what, example) in COMMANDS.items():
        assert f"  {name:16} {what}\n" in out and f"  megatron-detour {name} {example}\n" in out + "\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_own_help_and_example(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    out = capsys.readouterr().out
    assert not ended.value.code and out.startswith(f"usage: megatron-detour {name}")
    words = COMMANDS[name][1].split()
    assert " ".join(out.split()).count(f"Example: megatron-detour {name} {words[0]}") == 1
    flags = {word for word in words if word.startswith("--")}
    assert flags <= set(re.findall(r"--[a-z-]+", re.sub(r"(?s)\nExample:.*?(\n\n|$)", "", out)))


WITHOUT_LIBRARIES = """
import sys
from megatron_detour.commands.main import main
try:
    main(["--help"])
finally:
    assert not {"torch", "numpy", "transformers", "megatron_detour.commands.plan"} & set(sys.modules)
"""


def test_help_of_all_loads_no_command():
    done = subprocess.run([sys.executable, "-c", WITHOUT_LIBRARIES], env=environment(), cwd=ROOT, capture_output=True)
    assert done.returncode == 0


def test_compare_passes_folders_on(monkeypatch, capsys):
    asked = []

    def write_comparison(folders: list[Path], output: Path) -> tuple[Path, str]:
        asked.append((folders, output))
        return output / "comparison.html", "a table"

    monkeypatch.setattr("megatron_detour.commands.compare.write_comparison", write_comparison)
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


def test_deepspeed_s_launcher_puts_its_flag_before_the_command(capsys):
    assert main(["--local_rank=0", "train", "english_large_50b", "--plan"]) == 0
    assert "15,895 + 1,590 = 17,485 steps" in capsys.readouterr().out
