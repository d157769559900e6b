"""`megatron-detour preprocess`: build a memory-mapped indexed corpus (P.bin, P.idx, P.manifest.json) from texts, and
verify, inspect and merge corpora."""

from __future__ import annotations

import argparse

from megatron_detour import settings
from megatron_detour.corpus import BuildOptions, build_corpus, examine, merge


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subcommands = parser.add_subcommands(implied="build")
    settings.add_arguments(subcommands.add_parser("build", help="build a corpus (the default)"), BuildOptions)
    for name, what in (
        ("verify", "check every byte and every id against the manifest"),
        ("stats", "print counts and lengths, and plot a histogram (P.lengths.png)"),
        ("peek", "print decoded documents"),
    ):
        command = subcommands.add_parser(name, help=what, description=what)
        command.add_argument("prefix", metavar="P", help="path of the corpus, without .bin")
        if name == "peek":
            command.add_argument("--tokenizer", help="tokenizer to decode with (that of the build)")
            command.add_argument("-n", type=int, default=3, metavar="N", help="number of documents (3)")
            command.add_argument(
                "--first", type=int, metavar="I", help="consecutive documents from I on (default: evenly spaced)"
            )
    command = subcommands.add_parser(
        "merge", help="concatenate corpora of one tokenizer", description="concatenate corpora, in order"
    )
    command.add_argument("prefixes", nargs="+", metavar="P", help="paths of the corpora, without .bin")
    command.add_argument("--output-prefix", required=True, metavar="Q", help="path of the merged corpus, without .bin")
    command.add_argument("--overwrite", action="store_true", help="replace an existing corpus")


def run(arguments: argparse.Namespace) -> None:
    if arguments.subcommand == "build":
        chosen = settings.from_namespace(BuildOptions, arguments)
        print(examine.summary(chosen, build_corpus(chosen)))
    elif arguments.subcommand == "merge":
        print(merge.merge_corpora(arguments.prefixes, arguments.output_prefix, arguments.overwrite))
    elif arguments.subcommand == "peek":
        for line in examine.peek(arguments.prefix, arguments.tokenizer, arguments.n, arguments.first):
            print(line)
    else:
        print({"verify": examine.verify, "stats": examine.stats}[arguments.subcommand](arguments.prefix))
