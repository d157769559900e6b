"""`megatron-detour gpu-day`: speed, memory, exactness and faults on this machine's GPU, in one JSON file."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from megatron_detour.commands.parser import ABOVE_ZERO
from megatron_detour.errors import DetourError

CLONE = Path(__file__).parents[2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="JSON", help="file to write, whole after each part")
    add("--minutes", type=ABOVE_ZERO, default=10, help="time for all parts (%(default)g)")
    add(
        "--only",
        nargs="+",
        metavar="PART",
        help="only these parts: docs/performance.md lists them",
    )
    add("--baseline", type=Path, metavar="JSON", help="file of an earlier day; its speeds are shown beside these")
    add("--size", choices=("base", "tiny"), default="base", help="tiny: to try the command, also without a GPU")


def run(options: argparse.Namespace) -> None:
    if not (CLONE / "benchmarks").is_dir():
        raise DetourError(
            "gpu-day needs benchmarks/, which is not installed: run `make install` in a clone and use that"
        )
    paths = {name: path and str(path.absolute()) for name, path in vars(options).items() if isinstance(path, Path)}
    # Not imported, as it is not installed with the package.
    command = [sys.executable, "-m", "benchmarks.gpu_day", json.dumps(vars(options) | paths)]
    os.chdir(CLONE)
    os.execv(sys.executable, command)
