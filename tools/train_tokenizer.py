"""Trains a tokenizer: python tools/train_tokenizer.py --input FILE... --output FOLDER --vocab-size N."""

from __future__ import annotations

import argparse
from pathlib import Path

try:
    from megatron_detour.corpus.train_tokenizer import train_tokenizer
    from megatron_detour.errors import command_line
except ModuleNotFoundError as missing:
    raise SystemExit(f"error: {missing}: run `make install` and start this with .venv/bin/python") from None


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains a byte-level BPE tokenizer with ModernBERT's special tokens.")
    parser.add_argument("--input", type=Path, nargs="+", required=True, help=".jsonl, .jsonl.gz or .txt files")
    parser.add_argument("--output", type=Path, required=True, help="new folder, which AutoTokenizer opens")
    parser.add_argument("--vocab-size", type=int, required=True, help="entries in all; a multiple of 64 runs fastest")
    parser.add_argument("--text-key", default="text", help="the key of a JSON line that holds the text")
    options = parser.parse_args()
    train_tokenizer(options.input, options.output, options.vocab_size, options.text_key)
    print(f"{options.output}: {options.vocab_size} entries")


if __name__ == "__main__":
    command_line(main)
