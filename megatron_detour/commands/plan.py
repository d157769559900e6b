"""`megatron-detour plan`: forecast a run without torch or a GPU."""

from __future__ import annotations

import argparse
import json

from megatron_detour.commands.parser import ABOVE_ZERO, COUNT, FRACTION, add_control, add_run_file, read_run_file
from megatron_detour.errors import DetourError
from megatron_detour.forecast import Forecast, forecast, plan_table, render
from megatron_detour.plan import Plan
from megatron_detour.text import visible
from megatron_detour.ui.format import counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_file(parser)
    add_control(parser)
    add = parser.add_argument
    add("--gpus", type=COUNT, metavar="N", help="number of GPUs, one rank each (parallel.tensor)")
    add("--gpu", metavar="NAME", help="h100, a100, l40s, cpu, ... (h100; cpu for fp32)")
    add("--gpu-memory", type=ABOVE_ZERO, default=80, metavar="GB", help="memory per GPU (%(default)s)")
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument("--rate", type=ABOVE_ZERO, metavar="TOKENS", help="measured tokens/s per GPU")
    speed.add_argument("--mfu", type=FRACTION, metavar="FRACTION", help="MFU (without: from a roofline model)")
    add("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Print the plan and the forecast. Return 1 if the run would be refused. Raises DetourError."""
    try:
        config = read_run_file(options.run_file, options.overrides, options.control)
    except DetourError as error:
        if not options.json:
            raise
        print(json.dumps({"faults": split_faults(error)}, indent=1, ensure_ascii=False))
        return 1
    plan = Plan.from_config(config)
    result = forecast(
        config,
        plan,
        options.gpus or config.parallel.tensor,
        device=options.gpu,
        gpu_memory=options.gpu_memory,
        rate=options.rate,
        mfu=options.mfu,
    )
    if options.json:
        print(json.dumps({"plan": plan.to_dict(), **result.to_dict()}, indent=1, ensure_ascii=False))
    else:
        print(visible("\n\n".join([plan_table(plan), render(result), verdict(result)])))
    return 1 if result.faults else 0


def split_faults(error: DetourError) -> list[str]:
    """Split an error into its faults."""
    head, *faults = str(error).split("\n  - ")
    return faults or [head]


def verdict(result: Forecast) -> str:
    if not result.faults:
        return "nothing here would stop the run"
    return f"{counted(len(result.faults), 'fault')} would stop the run"
