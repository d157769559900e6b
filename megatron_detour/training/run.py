"""The command that starts or resumes a run: arguments, run file, plan."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

from megatron_detour.checkpoint.store import checkpoint_folder
from megatron_detour.config import as_control, load, parse_control
from megatron_detour.errors import DetourError
from megatron_detour.observe.next_steps import next_commands
from megatron_detour.plan import Plan
from megatron_detour.preflight import preflight
from megatron_detour.run_directory import CHECKPOINTS, is_finished, refuse_another_run
from megatron_detour.runtime.launch import launch
from megatron_detour.runtime.preemption import Preemption
from megatron_detour.runtime.slurm import join_slurm
from megatron_detour.runtime.terminal import ctrl_c_for_this_rank


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise DetourError(f"{message}; --help lists what there is")


def main(default_run_file: str | Path, arguments: list[str] | None = None) -> int:
    """Runs what the command line says: [--run-file F] [--control] [--plan] [key=value ...]; returns the exit status.

    Raises DetourError.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parse(default_run_file, arguments)
    if not options.launch:
        join_slurm(os.environ)
    config = load(options.run_file, options.overrides)
    if options.control is not None:
        config = as_control(config, parse_control(options.control))
    plan = Plan.of(config)
    folder = Path(config.folder)
    first = int(os.environ.get("RANK", "0")) == 0
    if first and (options.plan or not options.launch):
        print(plan.table(), flush=True)
    if options.plan:
        print("only the run file was read: megatron-detour plan looks at the model and the corpora as well" * first)
        return 0
    if first:
        refuse_another_run(folder, config)
    if is_finished(folder, plan):
        if first:
            print(_finished(folder, plan), flush=True)
        return 0
    if options.launch:
        preflight(config, plan).refuse()  # in a second or two, before a launcher and torch are started for it
        return launch(sys.argv[0], [word for word in arguments if word != "--launch"])
    launched = os.environ.get("LOCAL_RANK") == "0" and first
    own_terminal = ctrl_c_for_this_rank() if launched else nullcontext()
    with Preemption(config.time_limit) as stop, own_terminal:  # a request that comes while libraries load is kept
        # torch and DeepSpeed take seconds to import: the plan and the faults of the run file come before.
        from megatron_detour.training.session import run_session

        return run_session(config, plan, folder, stop)


def _finished(folder: Path, plan: Plan) -> str:
    checkpoint = checkpoint_folder(folder / CHECKPOINTS, plan.total_steps)
    return (
        f"this run is finished: {plan.total_steps:,} steps, {plan.total_tokens:,} tokens; to train another one choose "
        f"another folder=...\nmodel    {checkpoint}\n{next_commands(folder, checkpoint, plan.has_detour)}"
    )


def _parse(default_run_file: str | Path, arguments: list[str] | None) -> argparse.Namespace:
    parser = _Parser(
        description="Continued pretraining with a causal detour. Started again in the same folder, a run goes on.",
        epilog="key=value changes a key of the run file, for instance phases.detour.tokens=1B or folder=runs/mine.",
    )
    parser.add_argument(
        "--run-file", default=str(default_run_file), metavar="RUN.yaml", help="the run to train (%(default)s)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument(
        "--control",
        nargs="?",
        const="mlm=0.30",
        metavar="mlm=RATE",
        help="the equal-compute twin: causal phases become MLM at this rate (mlm=0.30)",
    )
    parser.add_argument("--plan", action="store_true", help="print the plan and stop")
    parser.add_argument("--launch", action="store_true", help=argparse.SUPPRESS)  # bash's: start the ranks
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher's
    options = parser.parse_intermixed_args(arguments)
    if options.control is not None and not options.control.startswith("mlm=") and "=" in options.control:
        # `--control key=value`: the flag stood alone before an override.
        options.overrides.insert(0, options.control)
        options.control = "mlm=0.30"
    return options
