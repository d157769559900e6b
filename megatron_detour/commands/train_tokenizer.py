"""`megatron-detour train-tokenizer`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_detour.corpus.train_tokenizer import train_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", type=Path, nargs="+", required=True, metavar="FILE", help=".jsonl, .jsonl.gz or .txt files")
    add("--output", type=Path, required=True, metavar="DIR", help="new folder, which AutoTokenizer opens")
    add("--vocab-size", type=int, required=True, metavar="N", help="entries in all; a multiple of 64 runs fastest")
    add("--text-key", default="text", metavar="KEY", help="the key of a JSON line that holds the text (%(default)s)")


def run(options: argparse.Namespace) -> None:
    train_tokenizer(options.input, options.output, options.vocab_size, options.text_key)
    print(f"{options.output}: {options.vocab_size} entries")
