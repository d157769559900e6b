"""`megatron-detour plan`: what a run would take, without torch and without a GPU."""

from __future__ import annotations

import argparse
import json

from megatron_detour.commands.parser import above_zero, add_control, add_run_file, count, read_run_file, share
from megatron_detour.errors import DetourError
from megatron_detour.forecast import Forecast, forecast, plan_table, render
from megatron_detour.plan import Plan
from megatron_detour.text import visible
from megatron_detour.ui.format import counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_file(parser)
    add_control(parser)
    add = parser.add_argument
    add("--gpus", type=count, metavar="N", help="ranks, one per GPU (parallel.tensor)")
    add("--gpu", metavar="NAME", help="for instance h100, a100, l40s, cpu (h100, cpu where fp32)")
    add("--gpu-memory", type=above_zero, default=80, metavar="GB", help="of a GPU (%(default)s)")
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument("--rate", type=above_zero, metavar="TOKENS", help="measured tokens per second and GPU")
    speed.add_argument("--mfu", type=share, metavar="SHARE", help="of the GPU's peak that is reached (0.25)")
    add("--json", action="store_true", help="print everything as JSON")


def run(options: argparse.Namespace) -> int:
    """Prints the plan and the forecast; returns 1 where the run would be refused. Raises DetourError."""
    try:
        config = read_run_file(options.run_file, options.overrides, options.control)
    except DetourError as error:
        if not options.json:
            raise
        print(json.dumps({"faults": listed(error)}, indent=1, ensure_ascii=False))
        return 1
    plan = Plan.of(config)
    expected = forecast(
        config,
        plan,
        options.gpus or config.parallel.tensor,
        device=options.gpu,
        gpu_memory=options.gpu_memory,
        rate=options.rate,
        mfu=options.mfu,
    )
    if options.json:
        print(json.dumps({"plan": plan.to_dict(), **expected.to_dict()}, indent=1, ensure_ascii=False))
    else:
        print(visible("\n\n".join([plan_table(plan), render(expected), verdict(expected)])))
    return 1 if expected.faults else 0


def listed(error: DetourError) -> list[str]:
    """The faults of an error that may list several."""
    first, *others = str(error).split("\n  - ")
    return others or [first]


def verdict(forecast: Forecast) -> str:
    if not forecast.faults:
        return "nothing here would stop the run"
    return f"{counted(len(forecast.faults), 'fault')} would stop the run"
