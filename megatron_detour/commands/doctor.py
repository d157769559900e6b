"""`megatron-detour doctor`: check everything that a run needs, one line each. It trains nothing and sends nothing."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from megatron_detour.commands import machine
from megatron_detour.commands.machine import FAULT, NOTE, OK, CheckResult
from megatron_detour.commands.parser import add_run_file
from megatron_detour.commands.plan import split_faults
from megatron_detour.config import RunConfig, load
from megatron_detour.config.deepspeed import is_bf16
from megatron_detour.corpus.examine import verify
from megatron_detour.errors import DetourError
from megatron_detour.forecast import Forecast, forecast
from megatron_detour.kernels.check import Sizes
from megatron_detour.model.choose import run_sizes
from megatron_detour.plan import Plan
from megatron_detour.preflight import Preflight, preflight
from megatron_detour.ui.format import counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_file(parser, nargs="?")


def run(options: argparse.Namespace) -> int:
    """Print one line per check, as they finish. Return 1 if any of them is a fault. Raises DetourError."""
    run_file, overrides = options.run_file, options.overrides
    if run_file and "=" in run_file and not Path(run_file).exists():
        raise DetourError(f"doctor {run_file}: give the run file before its overrides")
    states = []
    for result in items(run_file, overrides):
        print(result, flush=True)
        states.append(result.state)
    faults, notes = states.count(FAULT), states.count(NOTE)
    print(f"\n{counted(len(states), 'check')}: {counted(faults, 'fault')}, {counted(notes, 'note')}")
    return 1 if faults else 0


def items(run_file: str | None, overrides: list[str]) -> Iterator[CheckResult]:
    faults, config, checked = [], None, None
    if run_file is not None:
        try:
            config = load(run_file, overrides)
            checked = preflight(config, Plan.from_config(config), _ranks(config))
        except DetourError as fault:
            faults = split_faults(fault)
    yield from machine.packages()
    yield from machine.gpus()
    yield machine.precision(checked and checked.deepspeed)
    yield machine.collectives()
    yield from machine.host()
    yield from (CheckResult(FAULT, "run file", fault) for fault in faults)
    if config:
        yield CheckResult(OK, "run file", f"{run_file}: {config.name}")
        yield from _of_run(config, checked)
    else:
        yield from machine.compute()
        yield machine.disk(Path.cwd())


def _of_run(config: RunConfig, checked: Preflight) -> Iterator[CheckResult]:
    yield from _model(config, checked)
    expected, sizes = _forecast(config, _ranks(config), checked), Sizes()
    shape, compute = expected.shape, config.compute
    if shape and expected.micro_batches:
        chosen = {name: batch.sequences for name, batch in expected.micro_batches.items()}
        plan = Plan.from_config(config).with_micro_sequences(chosen)
        sizes = run_sizes(shape, config.parallel.tensor, plan.micro_batches)
    dtype = torch.bfloat16 if checked.deepspeed and is_bf16(checked.deepspeed) else torch.float32
    yield from machine.compute(compute.attention, compute.kernels, dtype, sizes)
    if shape and compute.compile:
        yield machine.compiler(shape, compute.recompute, dtype, sizes)
    yield machine.disk(Path(config.folder), expected.disk.needed if expected.disk else 0)
    yield from _memory(expected)
    others = (fault for fault in checked.faults if not fault.startswith(("model.", "compute.")))  # shown above
    yield from (CheckResult(FAULT, "plan", fault) for fault in others)
    yield from (CheckResult(NOTE, "plan", warning) for warning in expected.warnings)
    yield from _corpora(config)


def _ranks(config: RunConfig) -> int:
    """One per GPU of this machine, or the fewest that the run file allows."""
    return torch.cuda.device_count() if torch.cuda.is_available() else config.parallel.tensor


def _forecast(config: RunConfig, ranks: int, checked: Preflight) -> Forecast:
    plan = Plan.from_config(config)
    if not torch.cuda.is_available():
        return forecast(config, plan, ranks, checked=checked, device="cpu")
    _, total = torch.cuda.mem_get_info(0)
    name = torch.cuda.get_device_name(0)
    return forecast(config, plan, ranks, checked=checked, device=name, gpu_memory=total / 1e9)


def _model(config: RunConfig, checked: Preflight) -> Iterator[CheckResult]:
    faults = [fault for fault in checked.faults if fault.startswith("model.")]
    yield from (CheckResult(FAULT, "model", fault) for fault in faults)
    if not faults and config.model.start is None:
        yield CheckResult(OK, "model", "initialized from the seed")
    elif not faults:
        weights = len(checked.shape.weights)
        yield CheckResult(OK, "model", f"{checked.model.start}: {weights} weights match config.json")


def _memory(expected: Forecast) -> Iterator[CheckResult]:
    most = expected.most_memory
    if most is None:
        return
    ranks = counted(expected.ranks, "rank")
    text = f"about {most.needed / machine.GIB:.1f} GiB per rank including a margin, {ranks}"
    room = expected.gpu_memory * 1e9 if most.on_gpu else psutil.virtual_memory().total / expected.ranks
    if most.needed > room:
        advice = expected.advice or "set compute.recompute=full, or a smaller batch.micro_sequences"
        yield CheckResult(FAULT, "fit", f"{text}: more than the {room / machine.GIB:.1f} GiB available to each", advice)
    else:
        yield CheckResult(OK, "fit", text)


def _corpora(config: RunConfig) -> Iterator[CheckResult]:
    """Read every byte of the corpora that exist. Missing ones are faults of the plan."""
    lists = [config.data.corpora, config.validation.corpora, *(phase.corpora or () for phase in config.phases)]
    for prefix in dict.fromkeys(corpus.prefix for corpora in lists for corpus in corpora):
        if not Path(f"{prefix}.manifest.json").exists():
            continue
        try:
            yield CheckResult(OK, "corpus", verify(prefix))
        except DetourError as fault:
            yield CheckResult(FAULT, "corpus", str(fault))
