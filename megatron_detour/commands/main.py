"""The console command. A subcommand is a module of this package with `add_arguments` and `run`. It is imported only
when it is called, so that help and plans need no torch."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from megatron_detour import __version__
from megatron_detour.commands.parser import Parser
from megatron_detour.errors import DetourError, command_line

# Group -> subcommand -> its description and example arguments.
GROUPS = {
    "prepare": {
        "init": (
            "write a run file and a Slurm script for your texts, model and GPUs",
            "--texts notes --model answerdotai/ModernBERT-base --gpus 4 --gpu h100",
        ),
        "train-tokenizer": (
            "train a byte-level BPE tokenizer with ModernBERT's special tokens",
            "--input notes.jsonl --output data/tokenizer --vocab-size 32768",
        ),
        "extend-tokenizer": (
            "add the pieces that save most tokens on your texts to a start model's tokenizer",
            "--tokenizer models/ModernBERT-base --input notes.jsonl --add 2048 --output data/tokenizer",
        ),
        "preprocess": (
            "build a corpus from texts; verify, stats, peek and merge corpora",
            "--input notes --output-prefix data/notes --tokenizer models/ModernBERT-base --held-out 0.01",
        ),
    },
    "train": {
        "schema": ("print the JSON Schema of run files, for editors", "> run.schema.json"),
        "plan": (
            "forecast the memory, hours, epochs and disk of a run, and report every error that would stop it",
            "run.yaml --gpus 4 --gpu h100",
        ),
        "doctor": ("check this machine and, given a run file, everything that the run needs", "run.yaml"),
        "gpu-day": (
            "measure everything that a GPU shows, in ten minutes, in one file; runs in a clone of the repository",
            "--output gpu_day.json",
        ),
        "train": ("start or resume a run", "run.yaml phases.detour.tokens=2B --launch"),
        "batches": (
            "show what the model reads in given steps: text, masks, document boundaries; or export it as arrays",
            "run.yaml --steps 1-12 --output batches.npz",
        ),
        "report": ("rewrite the report.html of a run", "runs/notes"),
        "compare": ("compare runs on one page", "runs/notes-control runs/notes"),
    },
    "use": {
        "convert": (
            "export a checkpoint as a Hugging Face folder with a model card",
            "--checkpoint runs/notes --output models/notes-bert --language en",
        ),
        "fill-mask": (
            "compare what models predict for masked words",
            "--model models/ModernBERT-base --model models/notes-bert --from-corpus notes.jsonl",
        ),
        "evaluate": (
            "compare models on downstream tasks (fine-tuning, several seeds) or on masked words of your texts",
            "--model models/ModernBERT-base models/notes-bert --tasks hoc --data tasks --output evaluation/notes",
        ),
        "analyze": (
            "what the detour changed: drift, persistence, transplants, probes, needles, and the layers that it needs",
            "--detour models/notes-bert --control models/notes-control --corpus held_out.jsonl --output drift.json",
        ),
        "study": (
            "run arms of pretraining against each other, by criteria that are registered before the first result",
            "examples/studies/quickstart.yaml",
        ),
    },
}
COMMANDS = {name: facts for group in GROUPS.values() for name, facts in group.items()}


def entry(command: str | None = None) -> None:
    """Run the command line of this process. With `command` (tools/), all arguments are those of that subcommand."""
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold bytes that are not UTF-8
    command_line(lambda: main([command, *sys.argv[1:]] if command else sys.argv[1:]))


def main(arguments: list[str]) -> int:
    """Run a subcommand and return its exit status. Raises DetourError."""
    if arguments and arguments[0].startswith("--local_rank="):  # DeepSpeed's launcher puts it before the script's words
        arguments = [*arguments[1:], arguments[0]]
    parser = Parser(
        prog="megatron-detour",
        description="Continued pretraining of encoders with a causal detour.",
        epilog=_listing(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="see COMMAND --help")
    name = parser.parse_args(arguments[:1]).command
    try:
        command = import_module(f"megatron_detour.commands.{name.replace('-', '_')}")
    except ModuleNotFoundError as missing:
        raise DetourError(f"{missing}: install megatron-detour with pip, or run make install in a clone") from None
    what, example = COMMANDS[name]
    parser = Parser(
        prog=f"megatron-detour {name}", description=what, epilog=f"Example: megatron-detour {name} {example}"
    )
    command.add_arguments(parser)
    return command.run(parser.read(arguments[1:])) or 0


def _listing() -> str:
    lines = []
    for group, commands in GROUPS.items():
        lines += ["", f"{group}:"]
        for name, (what, example) in commands.items():
            lines += [f"  {name:16} {what}", f"{'':18} megatron-detour {name} {example}"]
    return "\n".join(lines[1:])
