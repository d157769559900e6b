#!/usr/bin/env python3
"""Builds a memory-mapped indexed corpus (PREFIX.bin, PREFIX.idx, PREFIX.manifest.json) from text files."""

import argparse

from megatron_detour.data.build import build_corpus
from megatron_detour.data.documents import KINDS
from megatron_detour.errors import command_line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help=f"text files: {', '.join(KINDS)}")
    parser.add_argument("--output-prefix", required=True, metavar="P", help="the corpus to write: P.bin, P.idx, ...")
    parser.add_argument("--tokenizer", required=True, help="a folder, a tokenizer.json or a hub id in the local cache")
    parser.add_argument("--text-key", default="text", help="the key of a document's text in JSON lines (text)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes (1)")
    parser.add_argument("--skip-bad-lines", action="store_true", help="count lines that are no document and go on")
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus of the same prefix")
    parser.add_argument("--download", action="store_true", help="fetch the tokenizer from the hub if it is not cached")
    options = parser.parse_args()
    manifest = build_corpus(
        options.input,
        options.output_prefix,
        options.tokenizer,
        text_key=options.text_key,
        workers=options.workers,
        skip_bad_lines=options.skip_bad_lines,
        overwrite=options.overwrite,
        download=options.download,
    )
    left_out = f", {manifest.bad_lines:,} bad lines left out" if manifest.bad_lines else ""
    print(
        f"{options.output_prefix}: {manifest.documents:,} documents, {manifest.tokens:,} tokens"
        f" ({manifest.empty:,} empty lines{left_out})"
    )


if __name__ == "__main__":
    command_line(main)
