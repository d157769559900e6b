#!/usr/bin/env python3
"""Measure speed and memory of training, preprocessing, reading, checkpoints and reports."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is not part of the installed package

try:
    from benchmarks import checkpoints, preprocess, read, report, train
    from megatron_detour.commands.parser import Parser
    from megatron_detour.errors import command_line
    from megatron_detour.settings import add_arguments, from_namespace
except ModuleNotFoundError as missing:
    raise SystemExit(f"error: {missing}: run `make install` and start this with .venv/bin/python") from None

COMMANDS = {"preprocess": preprocess, "checkpoint": checkpoints, "report": report, "train": train, "read": read}


def main() -> None:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command")
    for name, module in COMMANDS.items():
        add_arguments(commands.add_parser(name, help=module.HELP, description=module.HELP), module.Settings)
    options = parser.parse_args()
    module = COMMANDS[options.command]
    module.run(from_namespace(module.Settings, options), say)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    command_line(main)
