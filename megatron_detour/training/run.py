"""The command that starts or resumes a run: arguments, run file, plan, and the folder that it takes."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import yaml

from megatron_detour.config import RunConfig, as_control, from_dict, load
from megatron_detour.errors import DetourError
from megatron_detour.files import write_whole
from megatron_detour.plan import Plan


def main(default_run_file: str | Path | None = None, arguments: list[str] | None = None) -> None:
    """Runs what the command line says: [RUN.yaml] [--control] [--plan] [key=value ...]. Raises DetourError."""
    options = _parse(default_run_file, arguments)
    config = load(options.run_file, options.overrides)
    if options.control is not None:
        config = as_control(config, _control_rate(options.control))
    plan = Plan.of(config)
    first = int(os.environ.get("RANK", "0")) == 0
    if first:
        print(plan.table(), flush=True)
    if options.plan:
        return
    folder = Path(config.folder)
    if first:
        claim(folder, config, plan)
    # torch and DeepSpeed take seconds to import: the plan and the faults of the run file come before.
    from megatron_detour.training.session import run_session

    run_session(config, plan, folder)


def claim(folder: Path, config: RunConfig, plan: Plan) -> None:
    """Takes the folder for this run. Raises DetourError when it holds another one, or anything else."""
    run_file = folder / "run.yaml"
    if run_file.exists():
        _refuse_another(run_file, config)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DetourError(f"{folder}: holds files but no run; choose another folder=... or empty it")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "plan.json", json.dumps(plan.to_dict(), indent=1))
    write_whole(run_file, yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True))


def _refuse_another(run_file: Path, config: RunConfig) -> None:
    try:
        there = from_dict(yaml.safe_load(run_file.read_text(encoding="utf-8")), str(run_file)).trajectory()
    except yaml.YAMLError:
        raise DetourError(f"{run_file}: not a YAML file; choose another folder=...") from None
    here = config.trajectory()
    for key in [*here, *there]:
        if here.get(key) != there.get(key):
            raise DetourError(
                f"{run_file.parent}: this folder holds another run: {key} is {there.get(key)!r} there and "
                f"{here.get(key)!r} here; choose another folder=... or the same settings to resume"
            )


def _parse(default_run_file: str | Path | None, arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Continued pretraining with a causal detour. Started again in the same folder, a run goes on.",
        epilog="key=value changes a key of the run file, for instance phases.detour.tokens=1B or folder=runs/mine.",
    )
    if default_run_file is None:
        parser.add_argument("run_file", metavar="RUN.yaml")
    else:
        parser.add_argument("--run-file", default=str(default_run_file), metavar="RUN.yaml", help="%(default)s")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument(
        "--control",
        nargs="?",
        const="mlm=0.30",
        metavar="mlm=RATE",
        help="the equal-compute twin: causal phases become MLM at this rate (mlm=0.30)",
    )
    parser.add_argument("--plan", action="store_true", help="print the plan and stop")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher's
    options = parser.parse_intermixed_args(arguments)
    if options.control is not None and not options.control.startswith("mlm=") and "=" in options.control:
        # `--control key=value`: the flag stood alone before an override.
        options.overrides.insert(0, options.control)
        options.control = "mlm=0.30"
    return options


def _control_rate(text: str) -> float:
    objective, _, rate = text.partition("=")
    try:
        if objective != "mlm":
            raise ValueError
        return float(rate)
    except ValueError:
        raise DetourError(f"--control {text}: write it as --control or --control mlm=0.30") from None
