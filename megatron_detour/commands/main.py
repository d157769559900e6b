"""The console command. A command is a module beside this one with `add_arguments` and `run`, which is imported only
when it is called: help and plans come without torch."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from megatron_detour import __version__
from megatron_detour.commands.parser import Parser
from megatron_detour.errors import DetourError, command_line

# Group -> command -> what it does, and an example of its arguments.
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
        "preprocess": (
            "build a corpus from texts; verify, stats, peek and merge corpora",
            "--input notes --output-prefix data/notes --tokenizer models/ModernBERT-base --held-out 0.01",
        ),
    },
    "train": {
        "schema": ("print the JSON Schema of run files, for editors", "> run.schema.json"),
        "plan": (
            "what a run would take and what would stop it: memory, hours, epochs, disk, faults",
            "run.yaml --gpus 4 --gpu h100",
        ),
        "doctor": ("look at this machine, and with a run file at what the run would use of it", "run.yaml"),
        "train": ("start a run, or resume it", "run.yaml phases.detour.tokens=2B --launch"),
        "batches": (
            "show what the model reads in some steps: text, masks, document borders; or write it as arrays",
            "run.yaml --steps 1-12 --output batches.npz",
        ),
        "report": ("write a run's report.html again", "runs/notes"),
        "compare": ("one page that sets runs side by side", "runs/notes runs/notes-control"),
    },
    "use": {
        "convert": (
            "turn a checkpoint into a Hugging Face folder with a model card",
            "--checkpoint runs/notes --output models/notes-bert --language en",
        ),
        "fill-mask": (
            "ask models to fill in words, side by side",
            "--model models/ModernBERT-base --model models/notes-bert --from-corpus notes.jsonl",
        ),
        "evaluate": (
            "fine-tune models on downstream tasks, or measure masked words: which is better, and how sure is that?",
            "--model models/ModernBERT-base models/notes-bert --tasks hoc --data tasks --output evaluation/notes",
        ),
    },
}
COMMANDS = {name: facts for group in GROUPS.values() for name, facts in group.items()}


def entry(command: str | None = None) -> None:
    """The process's arguments to their command, or all of them to this one (tools/)."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may hold bytes that are not UTF-8
    command_line(lambda: main([command, *sys.argv[1:]] if command else sys.argv[1:]))


def main(arguments: list[str]) -> int:
    """Runs a command and returns its exit status. Raises DetourError."""
    parser = Parser(
        prog="megatron-detour",
        description="Continued pretraining of encoders with a causal detour.",
        epilog=_listing(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="COMMAND --help says more")
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
