#!/usr/bin/env python3
"""Fine-tunes models on downstream tasks and says which is better, and how sure that is.

Started again with the same arguments it does only what is missing. The word "run" may be left out: evaluate.py --model
... is evaluate.py run --model ..., whose options evaluate.py run --help tells.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    from megatron_detour.errors import command_line
    from megatron_detour.evaluation import command
    from megatron_detour.evaluation.masked_words import command as intrinsic_command
except ModuleNotFoundError as missing:
    raise SystemExit(f"error: {missing}: run `make install` and start this with .venv/bin/python") from None

COMMANDS = ("run", "report", "tasks", "intrinsic")


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = whole.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    run = commands.add_parser("run", help="fine-tune and score; the word may be left out", description=__doc__)
    command.add_run_arguments(run)
    report = commands.add_parser("report", help="tables and plots again, from the results", description="rebuild them")
    command.add_report_arguments(report)
    commands.add_parser("tasks", help="the tasks that are known, and groups of them", description="list the tasks")
    intrinsic = commands.add_parser("intrinsic", help="measures without labels", description=intrinsic_command.__doc__)
    intrinsic_command.add_arguments(intrinsic)
    return whole


def main() -> int | None:
    words = sys.argv[1:]
    of_run = bool(words) and words[0].startswith("-") and words[0] not in ("-h", "--help")
    options = parser().parse_args(["run", *words] if of_run else words)
    if options.command == "run":
        return command.run(options)
    if options.command == "report":
        return command.report(Path(options.output), options.baseline)
    if options.command == "tasks":
        return command.list_tasks()
    return intrinsic_command.run(options)


if __name__ == "__main__":
    command_line(main)
