#!/usr/bin/env python3
"""Measures speed and memory beside peers in one run: tools/benchmark.py train [--against transformers], preprocess."""

import argparse
import itertools
import os
import sys
from pathlib import Path

from megatron_detour.benchmark import preprocess
from megatron_detour.benchmark.train import DTYPES, SIZES, Settings, measure_all, table, write_json
from megatron_detour.config import ATTENTION, KERNELS, OBJECTIVES, RECOMPUTE
from megatron_detour.errors import DetourError, command_line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    preprocess.add_command(commands)
    train = commands.add_parser(
        "train",
        help="forward and backward passes of a model with random weights; no optimiser",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = train.add_argument
    add("--size", choices=SIZES, default="base", help="of the model")
    add("--layers", type=int, help="fewer or more layers than the size has")
    add("--objective", choices=OBJECTIVES, nargs="+", default=["mlm"], help="one or both, one after the other")
    add("--mask-rate", type=float, default=0.3, help="of mlm")
    add("--dtype", choices=DTYPES, nargs="+", default=["bf16"], help="one or both")
    add("--corpus", metavar="PREFIX", help="documents of a corpus of tools/preprocess_data.py, not invented")
    add("--full", action="store_true", help="invented documents, each as long as the sequence")
    add("--sequence-length", type=int, default=1024, help="of a pack; longer documents lose their end")
    add("--micro-sequences", type=int, default=4, help="packs in a forward pass")
    add("--tokens", type=int, default=16384, help="of a step, about")
    add("--attention", choices=ATTENTION, default="auto", help="backend")
    add("--kernels", choices=KERNELS, default="auto", help="fused or plain")
    add("--recompute", choices=RECOMPUTE, default="none", help="activation checkpointing")
    add("--tensor", type=int, default=1, help="tensor-parallel ranks, started with torchrun")
    add("--sequence-parallel", action="store_true", help="share out positions between tensor-parallel layers")
    add("--against", choices=["transformers"], help="a peer, measured in turns on the same documents")
    add("--peer-attention", default="sdpa", help="the peer's attn_implementation")
    add("--peer-compile", action="store_true", help="put torch.compile around the peer's model")
    add("--peer-batch", type=int, default=8, help="documents in a padded batch of the peer")
    add("--rounds", type=int, default=3, help="steps of each contender, after round 0, which does not count")
    add("--seed", type=int, default=0, help="of documents and masks")
    add("--json", type=Path, metavar="FILE", help="write all figures here")
    options = vars(parser.parse_args())
    if run := options.pop("run", None):
        return run(options)
    target, objectives, dtypes = options.pop("json"), options.pop("objective"), options.pop("dtype")

    if target and not target.parent.is_dir():
        raise DetourError(f"--json: there is no folder {target.parent}")

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    chosen = itertools.product(objectives, dtypes)
    results = measure_all([Settings(objective=objective, dtype=dtype, **options) for objective, dtype in chosen], say)
    if os.environ.get("RANK", "0") == "0":
        print(table(results))
        if target:
            write_json(target, results)


if __name__ == "__main__":
    command_line(main)
