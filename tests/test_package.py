"""The source distribution is the repository: what the README's commands need is in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from tests.harness import ROOT

FOLDERS = ("docs", "ds_configs", "examples", "megatron_detour", "tests", "tools", ".ci")
FILES = (
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "constraints.txt",
    "pyproject.toml",
    "setup.py",
    ".gitignore",
)
LEFT = shutil.ignore_patterns("__pycache__", "*.py[co]")


def test_the_source_distribution_holds_every_file(tmp_path):
    tree = tmp_path / "tree"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=LEFT)
    for name in FILES:
        shutil.copy(ROOT / name, tree / name)
    files = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
    build = "from setuptools import build_meta; print(build_meta.build_sdist('..'))"
    made = subprocess.run([sys.executable, "-c", build], cwd=tree, env=os.environ, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    with tarfile.open(tmp_path / made.stdout.split()[-1]) as archive:
        held = {Path(*Path(name).parts[1:]).as_posix() for name in archive.getnames()}
    assert files - held == set()
    assert {"examples/pretrain_large.sh", "tools/convert_to_hf.py", "tests/test_package.py", ".ci/run"} <= held
