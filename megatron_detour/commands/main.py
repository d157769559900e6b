"""Arguments of the console command. A command's module is imported only when it is called."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from typing import NoReturn

from megatron_detour import __version__
from megatron_detour.errors import DetourError, command_line

CONTROL_RATE = 0.30


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise DetourError(f"{message}; {self.prog} --help lists what there is")


def entry() -> None:
    command_line(lambda: main(sys.argv[1:]))


def main(arguments: list[str]) -> int:
    """Runs a command and returns its exit status. Raises DetourError."""
    parser = _Parser(
        prog="megatron-detour",
        description="Continued pretraining of encoders with a causal detour.",
        epilog="\n".join(["commands:", *(f"  {name:8} {what}" for name, (what, _) in COMMANDS.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="COMMAND --help says more")
    name = parser.parse_args(arguments[:1]).command
    what, add_arguments = COMMANDS[name]
    command = _Parser(prog=f"megatron-detour {name}", description=what)
    add_arguments(command)
    options = command.parse_intermixed_args(_control_apart(arguments[1:]))
    return import_module(f"megatron_detour.commands.{name}").run(**vars(options))


def _add_plan(command: argparse.ArgumentParser) -> None:
    _add_run_file(command, nargs=None)
    command.add_argument(
        "--control", metavar="mlm=RATE", help=f"plan the equal-compute twin instead (mlm={CONTROL_RATE:.2f})"
    )
    command.add_argument("--gpus", type=_count, metavar="N", help="ranks, one a GPU (parallel.tensor)")
    command.add_argument("--gpu", metavar="NAME", help="for instance h100, a100, l40s, cpu (h100, cpu where fp32)")
    command.add_argument("--gpu-memory", type=_above_zero, default=80, metavar="GB", help="of a GPU (%(default)s)")
    speed = command.add_mutually_exclusive_group()
    speed.add_argument("--rate", type=_above_zero, metavar="TOKENS", help="measured tokens a second and GPU")
    speed.add_argument("--mfu", type=_share, metavar="SHARE", help="of the GPU's peak that is reached (0.25)")
    command.add_argument("--json", action="store_true", help="print everything as JSON")


def _add_doctor(command: argparse.ArgumentParser) -> None:
    _add_run_file(command, nargs="?")


def _add_compare(command: argparse.ArgumentParser) -> None:
    command.add_argument("folders", nargs="+", metavar="RUN", help="folders of runs")
    command.add_argument("--output", default="comparison", metavar="DIR", help="for the page (%(default)s)")


def _add_report(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="RUN", help="folder of a run")


COMMANDS = {
    "plan": ("what a run would take and what would stop it: memory, hours, epochs, disk, faults", _add_plan),
    "doctor": ("look at this machine, and with a run file at what the run would use of it", _add_doctor),
    "schema": ("print the JSON Schema of run files, for editors", lambda command: None),
    "compare": ("one page that sets runs side by side", _add_compare),
    "report": ("write a run's report.html again", _add_report),
}


def _add_run_file(command: argparse.ArgumentParser, nargs: str | None) -> None:
    command.add_argument("run_file", nargs=nargs, metavar="RUN.yaml")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="change a key of the run file")


def _control_apart(arguments: list[str]) -> list[str]:
    """`--control` may stand alone: its rate is put in before anything else could be taken for it."""
    found = []
    for word, following in zip(arguments, [*arguments[1:], ""], strict=False):
        alone = word == "--control" and not following.startswith("mlm=")
        found.append(f"--control=mlm={CONTROL_RATE}" if alone else word)
    return found


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"a whole number above 0 is needed, it is {text!r}")
    return int(text)


def _above_zero(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"a number above 0 is needed, it is {text!r}")
    return number


def _share(text: str) -> float:
    number = _above_zero(text)
    if number > 1:
        raise argparse.ArgumentTypeError(f"a share between 0 and 1 is needed, it is {text}")
    return number
