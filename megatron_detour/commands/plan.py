"""`megatron-detour plan`: what a run would take, without torch and without a GPU."""

from __future__ import annotations

import json
from typing import Any

from megatron_detour.config import RunConfig, as_control, load, parse_control
from megatron_detour.errors import DetourError
from megatron_detour.forecast import Forecast, forecast, plan_table, render
from megatron_detour.plan import Plan
from megatron_detour.text import visible


def run(run_file: str, overrides: list[str], control: str | None, gpus: int | None, **options: Any) -> int:
    """Prints the plan and the forecast; returns 1 where the run would be refused. Raises DetourError."""
    as_json = options.pop("json")
    try:
        config = read(run_file, overrides, control)
    except DetourError as error:
        if not as_json:
            raise
        print(json.dumps({"faults": listed(error)}, indent=1, ensure_ascii=False))
        return 1
    plan = Plan.of(config)
    told = forecast(
        config,
        plan,
        gpus or config.parallel.tensor,
        device=options["gpu"],
        gpu_memory=options["gpu_memory"],
        rate=options["rate"],
        mfu=options["mfu"],
    )
    if as_json:
        print(json.dumps({"plan": plan.to_dict(), **told.to_dict()}, indent=1, ensure_ascii=False))
    else:
        print(visible("\n\n".join([plan_table(plan), render(told), verdict(told)])))
    return 1 if told.faults else 0


def read(run_file: str, overrides: list[str], control: str | None) -> RunConfig:
    """The run file, or its equal-compute twin. Raises DetourError."""
    config = load(run_file, overrides)
    if control is None:
        return config
    return as_control(config, parse_control(control))


def listed(error: DetourError) -> list[str]:
    """The faults of an error that may tell several."""
    first, *others = str(error).split("\n  - ")
    return others or [first]


def verdict(told: Forecast) -> str:
    if not told.faults:
        return "nothing here would stop the run"
    return f"{len(told.faults)} fault{'s' if len(told.faults) > 1 else ''} would stop the run"
