"""`megatron-detour train-tokenizer`: train a byte-level BPE tokenizer."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_detour.corpus.train_tokenizer import train_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", type=Path, nargs="+", required=True, metavar="FILE", help=".jsonl, .jsonl.gz or .txt files")
    add("--output", type=Path, required=True, metavar="DIR", help="folder to create, for AutoTokenizer")
    add("--vocab-size", type=int, required=True, metavar="N", help="number of entries; a multiple of 64 is fastest")
    add("--text-key", default="text", metavar="KEY", help="JSON key of the text (%(default)s)")


def run(options: argparse.Namespace) -> None:
    train_tokenizer(options.input, options.output, options.vocab_size, options.text_key)
    print(f"{options.output}: {options.vocab_size} entries")
