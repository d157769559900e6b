"""Shows what models put in place of a mask: python tools/fill_mask.py --model FOLDER... --probes FILE."""

from __future__ import annotations

import argparse
from pathlib import Path

try:
    from transformers.utils import logging

    from megatron_detour.errors import command_line
    from megatron_detour.evaluation.probes import print_report, probes_from_corpus, read_probes, run_probes
except ModuleNotFoundError as missing:
    raise SystemExit(f"error: {missing}: run `make install` and start this with .venv/bin/python") from None


def main() -> None:
    parser = argparse.ArgumentParser(description="Asks masked language models to fill in words, side by side.")
    parser.add_argument(
        "--model", type=Path, action="append", required=True, help="Hugging Face folder; may be repeated"
    )
    parser.add_argument("--label", action="append", help="heading of a model's column; once for each --model")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--probes", type=Path, help='lines {"text": "... [MASK] ...", "answer": "word"}')
    source.add_argument("--from-corpus", type=Path, help="make probes of a .jsonl, .jsonl.gz or .txt file")
    parser.add_argument("--count", type=int, default=10, help="probes to make, with --from-corpus")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other probes, with --from-corpus")
    parser.add_argument("--text-key", default="text", help="the key of a JSON line that holds the text")
    parser.add_argument("--top", type=int, default=3, help="words to show for each mask")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if options.probes:
        probes = read_probes(options.probes)
    else:
        probes = probes_from_corpus(options.from_corpus, options.count, options.seed, options.text_key)
    print_report(run_probes(options.model, probes, options.label, options.top))


if __name__ == "__main__":
    command_line(main)
