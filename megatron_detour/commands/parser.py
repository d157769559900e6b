"""What the subcommands share: the parser, run file and overrides, --control, number types."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Annotated, NoReturn

from megatron_detour.errors import DetourError
from megatron_detour.settings import Range, flag_type

if TYPE_CHECKING:
    from megatron_detour.config import RunConfig

CONTROL_RATE = 0.30
COUNT = flag_type(Annotated[int, Range(least=1)])
ABOVE_ZERO = flag_type(Annotated[float, Range(above=0)])
FRACTION = flag_type(Annotated[float, Range(above=0, most=1)])


class Parser(argparse.ArgumentParser):
    """Reports errors in one sentence, and accepts options and positional arguments in any order."""

    implied: str | None = None  # the default subcommand

    def error(self, message: str) -> NoReturn:
        raise DetourError(f"{message}; see {self.prog} --help")

    def add_subcommands(self, implied: str) -> argparse._SubParsersAction:
        self.implied = implied
        return self.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")

    def read(self, words: list[str]) -> argparse.Namespace:
        if self.implied is None:
            return self.parse_intermixed_args(_control_apart(words))
        if words in (["-h"], ["--help"]):
            print(self.format_help())  # then the help of the default subcommand
        named = bool(words) and not words[0].startswith("-") and not words[0].endswith((".yaml", ".yml"))
        return self.parse_args(words if named else [self.implied, *words])


def add_run_file(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    add = parser.add_argument
    add("run_file", nargs=nargs, metavar="RUN.yaml", help="a run file, or the name of a packaged recipe")
    add(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="override a key, such as phases.detour.tokens=1B",
    )


def add_control(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--control",
        metavar="mlm=RATE",
        help=f"the control, on the same tokens: detour phases become MLM at this mask rate (mlm={CONTROL_RATE:.2f})",
    )


def read_run_file(run_file: str, overrides: list[str], control: str | None) -> RunConfig:
    """Return the configuration, or that of its control. Raises DetourError."""
    from megatron_detour.config import as_control, load, parse_control  # not needed for --help

    config = load(run_file, overrides)
    return config if control is None else as_control(config, parse_control(control))


def _control_apart(words: list[str]) -> list[str]:
    """Give a bare `--control` its default value, so that argparse does not take the next word for it."""
    pairs = zip(words, [*words[1:], ""], strict=False)
    return [
        f"--control=mlm={CONTROL_RATE}" if word == "--control" and not following.startswith("mlm=") else word
        for word, following in pairs
    ]
