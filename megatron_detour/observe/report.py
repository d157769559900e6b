"""The report of a run: its plots and one self-contained HTML page, made from the files of its folder alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_detour.files import write_whole
from megatron_detour.observe.plots import PLOTS
from megatron_detour.observe.run_folder import VALIDATION_FIGURES, Run, read_run
from megatron_detour.text import visible
from megatron_detour.ui.format import batch_words, byte_size, compact, duration, frozen_words
from megatron_detour.ui.page import Picture, render, write_pictures
from megatron_detour.ui.tables import columns

LISTED_GUARDS, LISTED_SOURCES = 20, 5


def write_report(run_folder: Path) -> Path:
    """Writes plots/*.png and report.html into the folder of a finished or unfinished run; returns the page's path.

    A plot without any figures is left out. Raises DetourError where the folder is not that of a run.
    """
    run_folder = Path(run_folder)
    run = read_run(run_folder)
    pictures = [Picture.of(plot, plot.draw([run], [run.name]), plot.caption) for plot in PLOTS if plot.caption]
    (run_folder / "plots").mkdir(exist_ok=True)
    write_pictures(pictures, run_folder / "plots")
    page = run_folder / "report.html"
    write_whole(page, _page(run, pictures))
    return page


def _page(run: Run, pictures: list[Picture]) -> str:
    facts = run.environment
    return render(
        "report.html.j2",
        Path(__file__).parent,
        run=run,
        pictures=pictures,
        headline=headline(run),
        changes=_changes(run),
        phases=[_phase_row(run, phase) for phase in run.phases],
        batch=_common_batch(run),
        boundaries=run.boundaries(),
        figures=_figures_by_boundary(run),
        guarded=run.guarded[:LISTED_GUARDS],
        corpora=[("training", _corpus(corpus)) for corpus in facts.get("corpora") or []]
        + [("validation", _corpus(corpus)) for corpus in facts.get("validation_corpora") or []],
        versions=facts.get("versions") or {},
        sessions=_sessions(run),
        model=facts.get("model") or {},
        unigram_loss=facts.get("unigram_loss"),
    )


def _corpus(facts: dict[str, Any]) -> dict[str, Any]:
    """Its facts, with the first few of its sources and what is left to tell of the others."""
    sources = facts.get("sources") or []
    others = (facts.get("source_files") or len(sources)) - LISTED_SOURCES
    size = facts.get("source_bytes") or sum(source["bytes"] for source in sources)
    rest = f"and {others:,} more, {byte_size(size)} in all" if others > 0 else ""
    return {**facts, "sources": sources[:LISTED_SOURCES], "other_sources": rest}


def as_text(run_folder: Path) -> str:
    """The validation figures by phase and what the run took, for a terminal."""
    run = read_run(Path(run_folder))
    done = f"{run.done_steps:,} of {run.plan['total_steps']:,} steps"
    said = [f"{visible(run.name)}: {'finished, ' if run.finished else ''}{done}"]
    figures = _figures_by_boundary(run)
    if figures:
        titles = [f"{row['title']}, {row['corpus']}" if row["corpus"] else row["title"] for row in figures]
        rows = [[title, *row["values"]] for title, row in zip(titles, figures, strict=True)]
        said.append(columns(["", *(boundary.title for boundary in run.boundaries())], rows))
    said.append(columns(["", "", ""], [[title, value, remark] for title, value, remark in headline(run)]))
    return "\n\n".join(said)


def _phase_row(run: Run, phase: dict[str, Any]) -> dict[str, Any]:
    done = min(max(run.done_steps - phase["first_step"] + 1, 0), phase["steps"])
    return {**phase, "done": done, "remarks": _remarks(run, phase)}


def _remarks(run: Run, phase: dict[str, Any]) -> list[str]:
    """The settings of a phase that say something: those that not every run has, or that its phases have differently."""
    remarks = []
    if phase.get("freeze"):
        remarks.append(f"{frozen_words(phase)} frozen")
    if phase.get("optimizer_state") == "reset":
        remarks.append("the optimizer state begins anew")
    if not _common_batch(run):
        remarks.append(batch_words(phase))
    if _several(run, "corpora"):
        named = (f"{corpus['prefix']} ({corpus['weight']:.4g})" for corpus in phase.get("corpora") or [])
        remarks.append(f"reads {', '.join(named)}")
    return remarks


def _common_batch(run: Run) -> str:
    """The batch of every phase, or nothing where the phases' remarks tell it."""
    if not run.phases or _several(run, "sequences") or _several(run, "sequence_length"):
        return ""
    return "" if any(phase.get("batch_warmup") for phase in run.phases) else batch_words(run.phases[0])


def _several(run: Run, key: str) -> bool:
    """Whether the phases differ in this setting."""
    return len({str(phase.get(key)) for phase in run.phases}) > 1


def _changes(run: Run) -> list[dict[str, Any]]:
    """The first and the last value of each validation figure."""
    changes = []
    for key, figure in VALIDATION_FIGURES.items():
        held = [record for record in run.validations if record.get(key) is not None]
        if not held:
            continue
        first, last = held[0], held[-1]
        changes.append(
            {
                "title": figure.axis,
                "objective": figure.objective,
                "first": figure.value(first[key]),
                "last": figure.value(last[key]),
                "first_step": first["step"],
                "last_step": last["step"],
                "change": figure.change(last[key] - first[key]),
                "single": first is last,
            }
        )
    return changes


def _figures_by_boundary(run: Run) -> list[dict[str, Any]]:
    """A row for each validation figure and corpus: its values at the boundaries of the phases."""
    rows = []
    for key, figure in VALIDATION_FIGURES.items():
        for corpus in ["", *run.validation_corpora]:
            held = [boundary.record.get(f"{key}/{corpus}" if corpus else key) for boundary in run.boundaries()]
            if any(value is not None for value in held):
                values = ["–" if value is None else figure.value(value) for value in held]
                rows.append({"title": figure.title, "objective": figure.objective, "corpus": corpus, "values": values})
    return rows


def _sessions(run: Run) -> list[dict[str, Any]]:
    """The sessions with how each ended; one that could not say was killed, or is still at work."""
    silent = ["killed"] * (len(run.sessions) - 1) + ["finished" if run.finished else "at work, or killed"]
    gaps = [session.get("missing_steps") for session in run.sessions]  # of the figures, when it began
    remarks = [f"; no figures of steps {steps}" if steps else "" for steps in gaps]
    return [
        {**session, "ended": f"{session.get('ended') or otherwise}{remark}"}
        for session, otherwise, remark in zip(run.sessions, silent, remarks, strict=False)
    ]


def headline(run: Run) -> list[tuple[str, str, str]]:
    """The figures of the whole run, each a title, a value and a remark."""
    facts = [("Tokens trained", compact(run.done_tokens), f"of {compact(run.plan['total_tokens'])} planned")]
    steps = run.steps
    seconds = steps.total("seconds")
    if seconds > 0:
        facts.append(("Training time", duration(seconds), "sum of the steps"))
        tokens = run.tokens_of_steps()[steps["seconds"] > 0].sum()
        facts.append(("Mean throughput", compact(tokens / seconds), "tokens per second"))
        facts.append(("Waiting for data", f"{steps.total('data_wait_seconds') / seconds:.1%}", "of the training time"))
        share = steps.mean("mfu", "seconds")
        if share is not None:
            facts.append(("MFU", f"{share:.1%}", "of the devices' peak, mean"))
        operations = 1e12 * steps.total_of("model_tflops", "seconds")
        if operations:
            facts.append(("Operations", f"{operations:.2e}", "floating-point operations of the model"))
    if steps.has("memory_bytes"):
        facts.append(("Peak memory", byte_size(float(np.nanmax(steps["memory_bytes"]))), "on one rank"))
    return facts
