#!/usr/bin/env python3
"""Measure speed and memory of training, preprocessing, reading, checkpoints and reports."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is not part of the installed package

try:
    from benchmarks import checkpoints, preprocess, read, report, train
    from benchmarks.train import DTYPES, SIZES
    from megatron_detour.config import ATTENTION, KERNELS, RECOMPUTE
    from megatron_detour.errors import command_line
    from megatron_detour.objectives import KINDS
except ModuleNotFoundError as missing:
    raise SystemExit(f"error: {missing}: run `make install` and start this with .venv/bin/python") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command")
    shape = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    for part in (preprocess, checkpoints, report):
        part.add_command(commands)
    what = "forward and backward passes of a model with random weights; no optimizer"
    add = commands.add_parser("train", help=what, **shape).add_argument
    add("--size", choices=SIZES, default="base", help="model size")
    add("--layers", type=int, help="override the number of layers")
    add("--objective", choices=sorted(KINDS), nargs="+", default=["mlm"], help="one or more, measured in turn")
    add("--mask-rate", type=float, default=0.3, help="mask rate of MLM")
    add("--dtype", choices=DTYPES, nargs="+", default=["bf16"], help="one or more")
    add("--corpus", metavar="PREFIX", help="read documents from this corpus instead of generating them")
    add("--full", action="store_true", help="generate documents as long as the sequence")
    add("--sequence-length", type=int, default=1024, help="tokens per pack; longer documents are truncated")
    add("--micro-sequences", type=int, default=4, help="packs per micro-batch")
    add("--tokens", type=int, default=16384, help="approximate tokens per step")
    add("--attention", choices=ATTENTION, default="auto", help="backend")
    add("--kernels", choices=KERNELS, default="auto", help="fused or plain")
    add("--recompute", choices=RECOMPUTE, default="none", help="activation checkpointing")
    add("--tensor", type=int, default=1, help="tensor-parallel ranks, started with torchrun")
    add("--sequence-parallel", action="store_true", help="split positions over tensor-parallel ranks")
    add("--against", choices=["transformers"], help="also measure a peer, alternating, on the same documents")
    add("--peer-attention", default="sdpa", help="the peer's attn_implementation")
    add("--peer-compile", action="store_true", help="compile the peer's model with torch.compile")
    add("--peer-batch", type=int, default=8, help="documents per padded batch of the peer")
    add("--rounds", type=int, default=3, help="steps per contender, after a warm-up step")
    add("--seed", type=int, default=0, help="seed of documents and masks")
    add("--json", type=Path, metavar="FILE", help="write all results here")
    what = "start-up, reading, masking, memory and padding with a large synthetic corpus"
    add = commands.add_parser("read", help=what, **shape).add_argument
    add("--folder", type=Path, required=True, help="for the corpus: 20 bytes per document, and a sparse file")
    add("--documents", type=int, default=50_000_000, help="documents in the corpus")
    add("--mean", type=int, default=400, help="mean tokens per document")
    add("--sequence-length", type=int, nargs="+", default=[1024, 8192], help="one or more")
    add("--sequences", type=int, default=512, help="sequences per batch")
    add("--batches", type=int, default=100, help="batches to read")
    options = vars(parser.parse_args())
    command = options.pop("command")
    if "run" in options:
        options.pop("run")(options)
    elif command == "train":
        train.run(say=say, **options)
    else:
        print(read.table(read.measure(read.Settings(**options), say)))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    command_line(main)
