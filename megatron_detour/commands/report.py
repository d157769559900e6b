"""`megatron-detour report`: rewrite the report of a run from its run directory."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_detour.observe.report import as_text, write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="RUN", help="run directory")


def run(options: argparse.Namespace) -> None:
    page = write_report(options.folder)
    print(f"{as_text(options.folder)}\n\nreport   {page}")
