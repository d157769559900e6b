"""The report of a run: four plots and one self-contained HTML page, made from the files of its folder alone."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from megatron_detour.files import write_whole
from megatron_detour.observe.plots import COLOURS, PLOTS, png
from megatron_detour.observe.progress import duration
from megatron_detour.observe.run_folder import VALIDATION_FIGURES, Run, byte_size, compact, rate_words, read_run


def write_report(run_folder: Path) -> Path:
    """Writes plots/*.png and report.html into the folder of a finished or unfinished run; returns the page's path.

    A plot without any figures is left out. Raises DetourError where the folder is not that of a run.
    """
    run_folder = Path(run_folder)
    run = read_run(run_folder)
    plots = []
    (run_folder / "plots").mkdir(exist_ok=True)
    for plot in PLOTS:
        path = run_folder / "plots" / plot.file
        figure = plot.draw(run)
        if figure is None:
            path.unlink(missing_ok=True)
            continue
        content = png(figure)
        write_whole(path, content)
        image = f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}"
        plots.append({"title": plot.title, "caption": plot.caption, "image": image})
    page = run_folder / "report.html"
    write_whole(page, _page(run, plots))
    return page


def _page(run: Run, plots: list[dict[str, str]]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(compact=compact, byte_size=byte_size, rate_words=rate_words, count="{:,}".format)
    facts = run.environment
    return environment.get_template("report.html.j2").render(
        run=run,
        plots=plots,
        colours=COLOURS,
        headline=_headline(run),
        changes=_changes(run),
        phases=[_phase_row(run, phase) for phase in run.phases],
        corpora=[("training", corpus) for corpus in facts.get("corpora") or []]
        + [("validation", corpus) for corpus in facts.get("validation_corpora") or []],
        versions=facts.get("versions") or {},
        sessions=facts.get("sessions") or [],
        model=facts.get("model") or {},
        unigram_loss=facts.get("unigram_loss"),
    )


def _phase_row(run: Run, phase: dict[str, Any]) -> dict[str, Any]:
    done = min(max(run.done_steps - phase["first_step"] + 1, 0), phase["steps"])
    return {**phase, "done": done}


def _changes(run: Run) -> list[dict[str, Any]]:
    """The first and the last value of each validation figure."""
    changes = []
    for key, title in VALIDATION_FIGURES.items():
        held = [record for record in run.validations if record.get(key) is not None]
        if not held:
            continue
        first, last = held[0], held[-1]
        form = "{:.1%}" if key.endswith("accuracy") else "{:.3f}"
        change = last[key] - first[key]
        signed = f"{100 * change:+.1f} points" if key.endswith("accuracy") else f"{change:+.3f}"
        changes.append(
            {
                "title": title,
                "objective": "clm" if "clm" in key else "mlm",
                "first": form.format(first[key]),
                "last": form.format(last[key]),
                "first_step": first["step"],
                "last_step": last["step"],
                "change": signed.replace("-", "\u2212"),
                "single": first is last,
            }
        )
    return changes


def _headline(run: Run) -> list[tuple[str, str, str]]:
    """The figures of the whole run, each a title, a value and a remark."""
    facts = [("Tokens trained", compact(run.done_tokens), f"of {compact(run.plan['total_tokens'])} planned")]
    timed = [record for record in run.records if record.get("seconds") is not None]
    seconds = sum(record["seconds"] for record in timed)
    if seconds > 0:
        facts.append(("Training time", duration(seconds), "sum of the steps"))
        facts.append(("Mean throughput", f"{compact(run.tokens_at(len(timed)) / seconds)}", "tokens per second"))
        waited = sum(record.get("data_wait_seconds") or 0 for record in timed)
        facts.append(("Waiting for data", f"{waited / seconds:.1%}", "of the training time"))
    memory = max((record.get("memory_bytes") or 0 for record in run.records), default=0)
    if memory:
        facts.append(("Peak memory", byte_size(memory), "on one rank"))
    return facts
