"""`megatron-detour preprocess`: a memory-mapped indexed corpus (P.bin, P.idx, P.manifest.json) from texts, and what can
be asked of it afterwards."""

from __future__ import annotations

import argparse

from megatron_detour import settings
from megatron_detour.corpus import BuildOptions, build_corpus, examine, merge


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subcommands = parser.add_subcommands(implied="build")
    settings.add_arguments(
        subcommands.add_parser("build", help="build a corpus; the word may be left out"), BuildOptions
    )
    for name, what in (
        ("verify", "check files against the manifest, every byte and every id"),
        ("stats", "counts, lengths and their histogram, P.lengths.png"),
        ("peek", "decode documents"),
    ):
        command = subcommands.add_parser(name, help=what, description=what)
        command.add_argument("prefix", metavar="P", help="the corpus: its path without .bin")
        if name == "peek":
            command.add_argument("--tokenizer", help="the tokenizer to decode with (the one of the build)")
            command.add_argument("-n", type=int, default=3, metavar="N", help="documents (3)")
            command.add_argument("--first", type=int, metavar="I", help="from document I on, not evenly spaced ones")
    command = subcommands.add_parser(
        "merge", help="join corpora of one tokenizer", description="join corpora, in order"
    )
    command.add_argument("prefixes", nargs="+", metavar="P", help="corpora: their paths without .bin")
    command.add_argument("--output-prefix", required=True, metavar="Q", help="the corpus to write")
    command.add_argument("--overwrite", action="store_true", help="replace a corpus of the same prefix")


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
