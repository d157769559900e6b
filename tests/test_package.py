"""The source distribution is the repository: what the README's commands need is in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from tests.harness import ROOT

FOLDERS = ("benchmarks", "docs", "ds_configs", "examples", "megatron_detour", "tests", "tools", ".ci")
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


def copy_of_the_tree(folder: Path) -> Path:
    """As a clone: links stay links."""
    for name in FOLDERS:
        if (ROOT / name).is_symlink():
            (folder / name).symlink_to((ROOT / name).readlink())
        else:
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=LEFT)
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    return folder


def built(tree: Path, kind: str) -> Path:
    """Builds a distribution beside the tree."""
    build = f"from setuptools import build_meta; print(build_meta.build_{kind}('..'))"
    made = subprocess.run([sys.executable, "-c", build], cwd=tree, env=os.environ, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return tree.parent / made.stdout.split()[-1]


def test_the_wheel_holds_recipes_and_templates_but_no_tests_and_no_benchmarks(tmp_path):
    (tmp_path / "tree").mkdir()
    tree = copy_of_the_tree(tmp_path / "tree")
    with zipfile.ZipFile(built(tree, "wheel")) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in held} == {"megatron_detour"}
    wanted = {".py", ".j2", ".yaml", ".json", ".sh"}
    package = {path for path in (tree / "megatron_detour").rglob("*") if path.suffix in wanted}
    assert {path.relative_to(tree).as_posix() for path in package} == held
    assert {"megatron_detour/recipes/quickstart.yaml", "megatron_detour/ds_configs/zero2_bf16.json"} <= held


def test_the_source_distribution_holds_every_file(tmp_path):
    (tmp_path / "tree").mkdir()
    tree = copy_of_the_tree(tmp_path / "tree")
    files = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
    with tarfile.open(built(tree, "sdist")) as archive:
        held = {Path(*Path(name).parts[1:]).as_posix() for name in archive.getnames()}
    assert files - held == set()
    assert {"examples/pretrain_large.sh", "tools/convert_to_hf.py", "tests/test_package.py", ".ci/run"} <= held
