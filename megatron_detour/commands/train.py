"""`megatron-detour train`: start a run, or resume the one in its run directory."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import nullcontext
from pathlib import Path

from megatron_detour.checkpoint.store import checkpoint_folder
from megatron_detour.commands.parser import add_control, read_run_file
from megatron_detour.errors import DetourError
from megatron_detour.forecast import plan_table
from megatron_detour.observe.next_steps import next_commands
from megatron_detour.plan import Plan
from megatron_detour.preflight import preflight
from megatron_detour.run_directory import CHECKPOINTS, is_finished, refuse_another_run
from megatron_detour.runtime.launch import launch
from megatron_detour.runtime.preemption import Preemption
from megatron_detour.runtime.slurm import join_slurm
from megatron_detour.runtime.terminal import ctrl_c_for_this_rank


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("words", nargs="*", metavar="RUN.yaml|key=value", help="the run file, then overrides of its keys")
    add("--run-file", metavar="RUN.yaml", help="a run file, or the name of a packaged recipe")
    add_control(parser)
    add("--plan", action="store_true", help="print the plan and exit")
    add(
        "--launch",
        action="store_true",
        help="start the DeepSpeed launcher with RANKS ranks (default: one per GPU)",
    )
    add("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # passed by launchers


def run(options: argparse.Namespace) -> int:
    """Train on the rank of this process, or launch all ranks. Return the exit status. Raises DetourError."""
    if options.run_file is None:
        options.run_file, *options.words = options.words or [None]
    if options.run_file is None:
        raise DetourError("no run file: give megatron-detour train a RUN.yaml or the name of a packaged recipe")
    if not options.launch:
        join_slurm(os.environ)
    config = read_run_file(options.run_file, options.words, options.control)
    plan = Plan.from_config(config)
    folder = Path(config.folder)
    first = int(os.environ.get("RANK", "0")) == 0
    if first and (options.plan or not options.launch):
        print(plan_table(plan), flush=True)
    if options.plan:
        print("only the run file was checked; megatron-detour plan also checks the model and the corpora" * first)
        return 0
    if first:
        refuse_another_run(folder, config)
    if is_finished(folder, plan):
        if first:
            print(_finished(folder, plan), flush=True)
        return 0
    if options.launch:
        preflight(config, plan).refuse()  # in a second or two, before a launcher and torch are started for it
        return launch(sys.argv[0], [word for word in sys.argv[1:] if word != "--launch"])
    launched = os.environ.get("LOCAL_RANK") == "0" and first
    own_terminal = ctrl_c_for_this_rank() if launched else nullcontext()
    with Preemption(config.time_limit) as stop, own_terminal:  # keeps a stop request that arrives during imports
        # torch and DeepSpeed take seconds to import: the plan and errors in the run file come first.
        from megatron_detour.training.trainer import run_training

        return run_training(config, plan, folder, stop)


def _finished(folder: Path, plan: Plan) -> str:
    checkpoint = checkpoint_folder(folder / CHECKPOINTS, plan.total_steps)
    return (
        f"this run is finished: {plan.total_steps:,} steps, {plan.total_tokens:,} tokens; to train another one, set "
        f"another folder=...\nmodel    {checkpoint}\n{next_commands(folder, checkpoint, plan.has_detour)}"
    )
