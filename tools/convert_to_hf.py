#!/usr/bin/env python3
"""Turns a checkpoint into a Hugging Face folder, after comparing its logits with transformers."""

import argparse

from megatron_detour.checkpoint.export import DTYPES, export
from megatron_detour.errors import command_line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="a checkpoint, or a run's folder: its newest"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder to write; it must not exist")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16", help="of the weights (bf16)")
    options = parser.parse_args()
    exported = export(options.checkpoint, options.output, options.dtype)
    step, steps = exported.run_state["step"], exported.run_state["total_steps"]
    print(f"{options.output}: step {step:,} of {steps:,}, logits equal transformers' within {exported.difference:.1e}")
    if step < steps:
        where = f"in phase {exported.run_state['phase']!r}" if step else "before the first step"
        print(f"warning: the run is not done; {exported.checkpoint} is {where}")


if __name__ == "__main__":
    command_line(main)
