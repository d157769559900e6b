#!/usr/bin/env python3
"""Measures speed and memory: train, preprocess (building corpora), read, checkpoint, report (of a long run)."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is not installed with the package

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
    what = "forward and backward passes of a model with random weights; no optimiser"
    add = commands.add_parser("train", help=what, **shape).add_argument
    add("--size", choices=SIZES, default="base", help="of the model")
    add("--layers", type=int, help="fewer or more layers than the size has")
    add("--objective", choices=sorted(KINDS), nargs="+", default=["mlm"], help="one or both, one after the other")
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
    what = "start-up, sequences, masks, memory and padding of a large made-up corpus"
    add = commands.add_parser("read", help=what, **shape).add_argument
    add("--folder", type=Path, required=True, help="for the corpus: 20 bytes a document, and a sparse file")
    add("--documents", type=int, default=50_000_000, help="of the corpus")
    add("--mean", type=int, default=400, help="tokens a document")
    add("--sequence-length", type=int, nargs="+", default=[1024, 8192], help="one or more")
    add("--sequences", type=int, default=512, help="in a batch")
    add("--batches", type=int, default=100, help="that are read")
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
