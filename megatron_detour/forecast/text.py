"""A plan and its forecast as text for a terminal."""

from __future__ import annotations

import textwrap

from megatron_detour.forecast.costs import ASSUMED_SHARE
from megatron_detour.forecast.forecast import Forecast
from megatron_detour.forecast.memory import CARDS, CONTEXT, GB, GIB, SPARE
from megatron_detour.objectives import read_objective
from megatron_detour.plan import Plan
from megatron_detour.ui.format import (
    byte_size,
    common_batch,
    compact,
    counted,
    duration,
    format_lr,
    settings_words,
)
from megatron_detour.ui.tables import Table


def plan_table(plan: Plan) -> str:
    """Return a table of the steps, tokens and settings of each phase."""
    phases = plan.to_dict()["phases"]
    batch = common_batch(phases)
    summary = (
        f"{plan.name}: {' + '.join(f'{phase.steps:,}' for phase in plan.phases)} = {plan.total_steps:,} steps, "
        f"{plan.total_tokens:,} tokens{f'; {batch}' if batch else ''}"
    )
    headers = ["phase", "objective", "steps", "tokens", "from step", "to step", "ends at token", "learning rate",
               "settings"]  # fmt: skip
    rows = [
        [
            phase["name"],
            read_objective(phase).describe(),
            f"{phase['steps']:,}",
            f"{phase['tokens']:,}",
            f"{phase['first_step']:,}",
            f"{phase['first_step'] + phase['steps'] - 1:,}",
            f"{phase['end_tokens']:,}",
            format_lr(phase["learning_rate"]),
            settings_words(phase, phases),
        ]
        for phase in phases
    ]
    return f"{summary}\n{Table(headers, rows, align='llrrrrrl').without_empty_columns().text()}"


def headline(forecast: Forecast) -> str:
    """Return at most eight lines for the start of a run."""
    lines = [f"model       {_model(forecast)}"]
    most = forecast.most_memory
    if most:
        lines.append(f"memory      {byte_size(most.counted)} per rank during the {most.moment}, {_fit(forecast)}")
    if forecast.micro_batches:
        lines.append(f"micro-batch {_micro_batches(forecast)}")
    if forecast.costs:
        lines.append(
            f"work        {forecast.flops:.3g} FLOP over {compact(sum(c.tokens for c in forecast.costs))} tokens"
        )
        if forecast.seconds is not None:
            lines.append(f"time        {_time(forecast)}")
    if forecast.disk:
        lines.append(f"disk        {_disk(forecast)}")
    concerns = [*forecast.faults, *forecast.warnings]
    if concerns:
        lines.append(
            f"warnings    {concerns[0].splitlines()[0]}" + (f" (and {len(concerns) - 1} more)" if concerns[1:] else "")
        )
    return "\n".join(lines)


def render(forecast: Forecast) -> str:
    """Return the whole forecast."""
    parts = [f"model       {_model(forecast)}"]
    if forecast.costs:
        parts += ["", *_time_table(forecast)]
    if forecast.memory:
        parts += ["", *_memory_table(forecast)]
    if forecast.readings:
        parts += ["", *_epochs_table(forecast)]
    if forecast.disk:
        parts += ["", f"disk        {_disk(forecast)}"]
    for title, sentences in (("note", forecast.notes), ("warning", forecast.warnings), ("fault", forecast.faults)):
        if sentences:
            parts += ["", *(f"{title}: {sentence}" for sentence in sentences)]
    return "\n".join(parts)


def _table(headers: list[str], rows: list[list[str]]) -> list[str]:
    return textwrap.indent(Table(headers, rows).without_empty_columns().text(), "  ").splitlines()


def _model(forecast: Forecast) -> str:
    shape = forecast.shape
    if shape is None:
        return f"{forecast.origin}: unknown"
    return (
        f"{forecast.origin}: {forecast.parameters / 1e6:,.2f}M parameters, {shape.layers} layers of {shape.hidden}, "
        f"{shape.vocabulary:,} ids"
    )


def _time(forecast: Forecast) -> str:
    speed, gpus = forecast.speed, _gpus(forecast)
    if speed.tokens_per_second:
        how = f"{speed.tokens_per_second:,.0f} tokens/s each (given)"
    elif speed.is_modeled:
        how = f"{ASSUMED_SHARE:.0%} of the roofline of each (assumed: a model, not a measurement)"
    elif speed.known:
        how = f"{speed.mfu:.0%} of {speed.chip.flops / 1e12:,.0f} TFLOP/s each (given)"
    else:
        return f"unknown on {gpus}: set a measured rate with --rate"
    sessions = "" if forecast.sessions == 1 else f", {forecast.sessions} sessions of {_limit(forecast)}"
    return f"{duration(forecast.seconds)} on {gpus} at {how}{sessions}"


def _gpus(forecast: Forecast) -> str:
    if forecast.device == "cpu":
        return counted(forecast.ranks, "CPU rank")
    return f"{forecast.ranks} x {forecast.device}"


def _limit(forecast: Forecast) -> str:
    return duration(forecast.time_limit) if forecast.time_limit else "24h"


def _fit(forecast: Forecast) -> str:
    """Say whether the memory fits, including the margin."""
    most = forecast.most_memory
    if not most.on_gpu:
        return f"{byte_size(most.needed)} with a margin"
    verdict = "fits" if most.fits(forecast.gpu_memory) else "does not fit"
    return f"{byte_size(most.needed)} with a margin: {verdict} {forecast.gpu_memory:g} GB"


def _disk(forecast: Forecast) -> str:
    disk = forecast.disk
    free = "" if disk.free is None else f"; {disk.free / GB:,.0f} GB free"
    return (
        f"{disk.needed / GB:.2f} GB at most: {counted(disk.checkpoints, 'checkpoint')} of "
        f"{disk.checkpoint / GB:.2f} GB at a time, and metrics of {disk.steps:,} steps{free}"
    )


def _time_table(forecast: Forecast) -> list[str]:
    headers = ["phase", "tokens", "FLOP", "FLOP/token", "roofline", "tokens/s per GPU", "time"]
    rows = []
    entries = [(c.name, c.tokens, c.flops, c.roofline, c.seconds) for c in forecast.costs]
    if len(entries) > 1:
        entries.append(("all", *(_total(column) for column in list(zip(*entries, strict=True))[1:])))
    for name, tokens, flops, bound, seconds in entries:
        rates = [f"{tokens / time / forecast.ranks:,.0f}" if time else "" for time in (bound, seconds)]
        when = duration(seconds) if seconds else "?"
        rows.append([name, f"{tokens:,}", f"{flops:.3g}", f"{flops / tokens:.3g}", rates[0], rates[1] or "?", when])
    if all(cost.sampled for cost in forecast.costs):
        documents = f"documents of {min(c.mean_document for c in forecast.costs):,.0f} tokens on average (sampled)"
    else:
        documents = "documents as long as the sequences (a corpus is missing); shorter ones cost less"
    lines = [f"time        {_time(forecast)}", *_table(headers, rows), f"  {documents}"]
    if forecast.speed.is_modeled:
        lines.append(
            f"  roofline: tokens/s per GPU at most, with {forecast.speed.attention} attention, without communication; "
            "give a measured --rate"
        )
    return lines


def _total(column: tuple[float | None, ...]) -> float | None:
    return None if None in column else sum(column)


def _micro_batches(forecast: Forecast) -> str:
    chosen = forecast.micro_batches
    if len(set(chosen.values())) == 1:
        return str(next(iter(chosen.values())))
    return ", ".join(f"{batch} in {name}" for name, batch in chosen.items())


def _memory_table(forecast: Forecast) -> list[str]:
    by_phase = forecast.memory
    parts = list(dict.fromkeys(part for memory in by_phase.values() for part in memory.parts))
    most = forecast.most_memory
    unit, size, digits = ("GiB", GIB, 2) if most.counted >= GIB else ("MiB", GIB >> 10, 1)
    rows = []
    for part in parts:
        rows.append(
            [part, *(f"{m.parts[part] / size:.{digits}f}" if part in m.parts else "-" for m in by_phase.values())]
        )
    rows.append(["counted", *(f"{m.counted / size:.{digits}f}" for m in by_phase.values())])
    rows.append(["with a margin", *(f"{m.needed / size:.{digits}f}" for m in by_phase.values())])
    lines = [f"memory      {_fit(forecast)}, on each of {_gpus(forecast)}", *_table([unit, *by_phase], rows)]
    lines.append(f"  peak memory during: {', '.join(f'{m.moment} ({name})' for name, m in by_phase.items())}")
    if most.on_gpu:
        fitting = ", ".join(f"{card} GB {'yes' if most.fits(card) else 'no'}" for card in CARDS)
        lines += [f"  fits: {fitting}", f"  margin: {SPARE:.0%} and {CONTEXT / GB:g} GB outside torch's allocator"]
    if forecast.micro_batches:
        chosen = any(batch.why for batch in forecast.micro_batches.values())
        at_start = "; a run chooses anew at its start, by the GPUs' free memory" if chosen and most.on_gpu else ""
        lines.append(f"  micro-batch: {_micro_batches(forecast)}{at_start}")
    if forecast.advice:
        lines.append(f"  {forecast.advice}")
    return lines


def _epochs_table(forecast: Forecast) -> list[str]:
    phases = list(dict.fromkeys(name for reading in forecast.readings for name in reading.read))
    headers = ["corpus", "tokens", *(f"read in {name}" for name in phases), "epochs"]
    rows = []
    for reading in forecast.readings:
        size = "missing" if reading.tokens is None else f"{reading.tokens:,}"
        epochs = "?" if reading.epochs is None else f"{reading.epochs:.2f}"
        rows.append([reading.prefix, size, *(compact(reading.read.get(name, 0)) for name in phases), epochs])
    return ["corpora", *_table(headers, rows)]
