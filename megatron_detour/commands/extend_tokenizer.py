"""`megatron-detour extend-tokenizer`: add the most useful pieces of a domain's texts to a tokenizer."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_detour.commands.parser import COUNT
from megatron_detour.corpus.extend_tokenizer import REPORT, extend_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--tokenizer", required=True, metavar="START", help="the start model's: a folder, a file or a hub id")
    add("--input", type=Path, nargs="+", required=True, metavar="CORPUS", help="texts of the domain, as for preprocess")
    add("--add", type=COUNT, required=True, metavar="N", help="number of new pieces")
    add("--output", type=Path, required=True, metavar="DIR", help="folder to create, for AutoTokenizer")
    add("--text-key", default="text", metavar="KEY", help="JSON key of the text (%(default)s)")
    add("--download", action="store_true", help="allow downloads of files that are not in the hub's local cache")


def run(options: argparse.Namespace) -> None:
    report = extend_tokenizer(
        options.tokenizer, options.input, options.output, options.add, options.text_key, options.download
    )
    before, after, held_out = (report[key] for key in ("before", "after", "held_out"))
    print(f"{options.output}: {options.add:,} new pieces, {report['ids']['after']:,} ids")
    print(f"held out: {held_out['documents']:,} documents, {held_out['words']:,} words ({options.output / REPORT})")
    for key in ("tokens_per_word", "bytes_per_token"):
        print(f"{key.replace('_', ' ')}: {before[key]:.3f} before, {after[key]:.3f} after")
