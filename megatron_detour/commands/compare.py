"""`megatron-detour compare`: compare runs on one page."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_detour.observe.compare import write_comparison


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", type=Path, nargs="+", metavar="RUN", help="run directories; the first is the baseline"
    )
    parser.add_argument("--output", type=Path, default="comparison", metavar="DIR", help="for the page (%(default)s)")


def run(options: argparse.Namespace) -> None:
    page, text = write_comparison(options.folders, options.output)
    print(f"{text}\n\npage  {page}")
