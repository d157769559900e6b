"""`megatron-detour fill-mask`: compare what models predict for masked words."""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers.utils import logging

from megatron_detour.evaluation.probes import print_report, probes_from_corpus, read_probes, run_probes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", type=Path, action="append", required=True, help="Hugging Face folder (repeatable)")
    add("--label", action="append", help="column heading, one per --model")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--probes", type=Path, help='lines {"text": "... [MASK] ...", "answer": "word"}')
    source.add_argument("--from-corpus", type=Path, help="create probes from a .jsonl, .jsonl.gz or .txt file")
    add("--count", type=int, default=10, help="number of probes for --from-corpus (%(default)s)")
    add("--seed", type=int, default=0, help="seed of the probes for --from-corpus (%(default)s)")
    add("--text-key", default="text", help="JSON key of the text (%(default)s)")
    add("--top", type=int, default=3, help="predictions per mask (%(default)s)")


def run(options: argparse.Namespace) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if options.probes:
        probes = read_probes(options.probes)
    else:
        probes = probes_from_corpus(options.from_corpus, options.count, options.seed, options.text_key)
    print_report(run_probes(options.model, probes, options.label, options.top))
