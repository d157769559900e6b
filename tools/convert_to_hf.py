#!/usr/bin/env python3
"""Turns a checkpoint into a Hugging Face folder with a model card, after comparing its logits with transformers."""

import argparse
from pathlib import Path

try:
    from megatron_detour.errors import command_line
    from megatron_detour.release import command
except ModuleNotFoundError as missing:
    raise SystemExit(f"error: {missing}: run `make install` and start this with .venv/bin/python") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    command.add_arguments(parser)
    options = parser.parse_args()
    rows = scored = None
    if options.evaluation:
        from megatron_detour.evaluation.report.page import model_table, scored_folder

        evaluation, name = Path(options.evaluation), command.evaluated_name(options)
        rows, scored = model_table(evaluation, name), scored_folder(evaluation, name)
    command.run(options, rows, scored)


if __name__ == "__main__":
    command_line(main)
