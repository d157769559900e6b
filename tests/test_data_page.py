"""docs/data.md: its commands run as they stand, one after the other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from megatron_detour.data.manifest import read_manifest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/data.md").read_text(encoding="utf-8")


def test_the_commands_of_the_page(tmp_path):
    for name in ("tools", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    printed = ""
    for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        done = subprocess.run(
            ["bash", "-ec", block], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        printed += done.stdout
    (shown,) = re.findall(r"^```\n(work/data/notes: .*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert shown.split("engine")[0] in printed  # but for the engine's version
    manifest = read_manifest(tmp_path / "work/data/notes")
    accounted = manifest.documents + manifest.held_out + manifest.empty + manifest.rejects
    assert manifest.records == accounted + sum(manifest.removed.values())
    both = read_manifest(tmp_path / "work/data/both")
    assert both.documents == manifest.documents + read_manifest(tmp_path / "work/data/more").documents
    assert (tmp_path / "work/data/notes.lengths.png").exists()
