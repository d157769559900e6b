#!/usr/bin/env python3
"""Builds a memory-mapped indexed corpus (P.bin, P.idx, P.manifest.json) from texts.

For corpora that are built: preprocess_data.py verify P, stats P, peek P and merge P... (--help after each of these).
"""

import argparse
import sys

try:
    from megatron_detour.corpus import BuildOptions, build_corpus, examine, merge
    from megatron_detour.errors import command_line
    from megatron_detour.settings import add_arguments, from_namespace
except ModuleNotFoundError as missing:
    raise SystemExit(f"error: {missing}: run `make install` and start this with .venv/bin/python") from None

COMMANDS = ("build", "verify", "stats", "peek", "merge")


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(description=__doc__)
    commands = whole.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    build = commands.add_parser("build", help="build a corpus; may be left out", description=__doc__)
    add_arguments(build, BuildOptions)
    for name, words in (
        ("verify", "check files against the manifest, every byte and every id"),
        ("stats", "counts, lengths and their histogram, P.lengths.png"),
        ("peek", "decode documents"),
    ):
        command = commands.add_parser(name, help=words, description=words)
        command.add_argument("prefix", metavar="P", help="the corpus: its path without .bin")
        if name == "peek":
            command.add_argument("--tokenizer", help="the tokenizer to decode with (the one of the build)")
            command.add_argument("-n", type=int, default=3, metavar="N", help="documents (3)")
            command.add_argument("--first", type=int, metavar="I", help="from document I on, not evenly spaced ones")
    command = commands.add_parser("merge", help="join corpora of one tokenizer", description="join corpora, in order")
    command.add_argument("prefixes", nargs="+", metavar="P", help="corpora: their paths without .bin")
    command.add_argument("--output-prefix", required=True, metavar="Q", help="the corpus to write")
    command.add_argument("--overwrite", action="store_true", help="replace a corpus of the same prefix")
    return whole


def main() -> None:
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may hold bytes that are not UTF-8
    words = sys.argv[1:]
    if words in (["-h"], ["--help"]):
        print(parser().format_help())  # the commands; the flags of `build`, which is meant without one, follow
    named = bool(words) and not words[0].startswith("-")
    arguments = parser().parse_args(words if named else ["build", *words])
    if arguments.command == "build":
        chosen = from_namespace(BuildOptions, arguments)
        print(examine.summary(chosen, build_corpus(chosen)))
    elif arguments.command == "merge":
        print(merge.merge_corpora(arguments.prefixes, arguments.output_prefix, arguments.overwrite))
    elif arguments.command == "peek":
        for line in examine.peek(arguments.prefix, arguments.tokenizer, arguments.n, arguments.first):
            print(line)
    else:
        print({"verify": examine.verify, "stats": examine.stats}[arguments.command](arguments.prefix))


if __name__ == "__main__":
    command_line(main)
