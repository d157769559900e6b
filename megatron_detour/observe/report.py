"""The report of a run: plots and a self-contained HTML page, from the files of the run directory alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_detour.files import write_whole
from megatron_detour.objectives import read_objective
from megatron_detour.observe.plots import PLOTS
from megatron_detour.observe.run_folder import VALIDATION_FIGURES, Run, read_run, validation_rows
from megatron_detour.text import visible
from megatron_detour.ui.format import byte_size, common_batch, compact, duration, format_lr, settings_words
from megatron_detour.ui.page import Picture, render, write_pictures
from megatron_detour.ui.tables import ABSENT, Entry, Table

LISTED_GUARDS, LISTED_SOURCES = 20, 5


def write_report(run_folder: Path) -> Path:
    """Write plots/*.png and report.html into the directory of a finished or unfinished run; return the page's path.

    Empty plots are omitted. Raises DetourError unless the folder is a run directory.
    """
    run_folder = Path(run_folder)
    run = read_run(run_folder)
    pictures = [
        Picture.from_figure(plot.file, plot.title, plot.caption, plot.draw([run], [run.name]))
        for plot in PLOTS
        if plot.caption
    ]
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
        plan=_plan_table(run),
        batch=common_batch(run.phases),
        figures=_figures_table(run),
        guards=_guards_table(run),
        corpora=_corpora_table(run),
        versions=facts.get("versions") or {},
        sessions=_sessions_table(run),
        model=facts.get("model") or {},
        unigram_loss=facts.get("unigram_loss"),
    )


def as_text(run_folder: Path) -> str:
    """Return the validation figures by phase and the overall figures as text for a terminal."""
    run = read_run(Path(run_folder))
    done = f"{run.done_steps:,} of {run.plan['total_steps']:,} steps"
    parts = [f"{visible(run.name)}: {'finished, ' if run.finished else ''}{done}"]
    tables = [_figures_table(run), Table(["", "", ""], headline(run), align="lrl")]
    return "\n\n".join(parts + [table.text() for table in tables if table.rows])


def _plan_table(run: Run) -> Table:
    headers = ["Phase", "Objective", "Input", "Steps", "Tokens", "From – to", "Learning rate", "Settings"]
    rows = [_plan_row(run, phase) for phase in run.phases]
    return Table(headers, rows, align="lllrrrll").without_empty_columns()


def _plan_row(run: Run, phase: dict[str, Any]) -> list[Entry]:
    done = min(max(run.done_steps - phase["first_step"] + 1, 0), phase["steps"])
    start, end = phase["start_tokens"], phase["end_tokens"]
    objective = read_objective(phase)
    return [
        Entry(phase["name"]),
        Entry(objective.label, style=f"{phase['objective']}-text"),
        Entry(objective.details() or ABSENT),
        Entry(f"{done:,} of {phase['steps']:,}" if done < phase["steps"] else f"{done:,}"),
        Entry(compact(phase["tokens"]), tip=f"{phase['tokens']:,}"),
        Entry(f"{compact(start)} – {compact(end)}", tip=f"{start:,} – {end:,}"),
        Entry(format_lr(phase["learning_rate"]), style="wide"),
        Entry(settings_words(phase, run.phases), style="wide"),
    ]


def _figures_table(run: Run) -> Table:
    """Return a row per validation figure and corpus: its values at the phase boundaries."""
    boundaries = run.boundaries()
    rows = [
        [Entry(row.title, style=f"{row.figure.objective}-text"), *row.texts(ABSENT)]
        for row in validation_rows([boundary.record for boundary in boundaries])
    ]
    return Table(["Figure", *(boundary.title for boundary in boundaries)], rows)


def _guards_table(run: Run) -> Table:
    rows = [
        [
            f"{record['step']:,}",
            compact(run.tokens_at(record["step"])),
            record.get("phase") or ABSENT,
            "skipped" if record.get("skipped") else "made",
            record.get("skipped") or record["spike"],
        ]
        for record in run.guarded[:LISTED_GUARDS]
    ]
    return Table(["Step", "Tokens", "Phase", "Update", "Why"], rows, align="rrl")


def _corpora_table(run: Run) -> Table:
    headers = ["Use", "Corpus", "Weight", "Documents", "Tokens", "Sources", "Ids (SHA-256)", "Tokenizer (SHA-256)"]
    uses = {"training": "corpora", "validation": "validation_corpora"}
    rows = [[use, *_corpus(facts)] for use, key in uses.items() for facts in run.environment.get(key) or []]
    return Table(headers, rows, align="llrrrlll")


def _corpus(facts: dict[str, Any]) -> list[Entry]:
    weight, documents, tokens = (facts.get(key) for key in ("weight", "documents", "tokens"))
    return [
        Entry(facts["prefix"]),
        Entry(ABSENT if weight is None else f"{weight:.4g}"),
        Entry(ABSENT if documents is None else f"{documents:,}"),
        Entry(ABSENT) if tokens is None else Entry(compact(tokens), tip=f"{tokens:,}"),
        _sources(facts),
        *(
            Entry((facts.get(key) or ABSENT)[:12], style="code", tip=facts.get(key) or "")
            for key in ("sha256", "tokenizer_sha256")
        ),
    ]


def _sources(facts: dict[str, Any]) -> Entry:
    """Return the first few sources, and the number of the rest."""
    sources = facts.get("sources") or []
    others = (facts.get("source_files") or len(sources)) - LISTED_SOURCES
    size = facts.get("source_bytes") or sum(source["bytes"] for source in sources)
    lines = [f"{source['path']} ({byte_size(source['bytes'])})" for source in sources[:LISTED_SOURCES]]
    rest = f"and {others:,} more, {byte_size(size)} in all" if others > 0 else ""
    return Entry("\n".join(lines), note=rest, style="wide lines")


def _changes(run: Run) -> list[dict[str, Any]]:
    """Return the first and the last value of each validation figure."""
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


def _sessions_table(run: Run) -> Table:
    """Return the sessions and how each ended; without a record it was killed or is still running."""
    silent = ["killed"] * (len(run.sessions) - 1) + ["finished" if run.finished else "running, or killed"]
    headers = ["Started", "After step", "Ended", "Ranks", "Device", "Attention, kernels, precision"]
    rows = [_session(*each) for each in zip(run.sessions, silent, range(len(run.sessions)), strict=False)]
    return Table(headers, rows, align="lrlrll")


def _session(session: dict[str, Any], otherwise: str, number: int) -> list[Entry]:
    missing = session.get("missing_steps")  # without figures when the session began
    parallel, cores, recompute = (session.get(key) for key in ("tensor_parallel", "host_cores", "recompute"))
    how = [f"recompute {recompute}"] if recompute else []
    how += ["compiled layers"] if session.get("compile") else []
    how += [f"skipped: {fault}" for fault in session.get("passed_over") or []]
    precision = f", {session['dtype']}" if session.get("dtype") else ""
    return [
        Entry(session.get("started") or ABSENT, note="(resumed)" if number else ""),
        Entry(f"{session['step']:,}"),
        Entry((session.get("ended") or otherwise) + (f"; no figures of steps {missing}" if missing else "")),
        Entry(
            str(session.get("ranks", ABSENT)), note=f"tensor parallel {parallel}" if parallel not in (None, 1) else ""
        ),
        Entry(session.get("device", ABSENT), note=f"{cores} host cores" if cores else ""),
        Entry(
            f"{session.get('attention', ABSENT)}, {session.get('kernels', ABSENT)}{precision}",
            note="\n".join(how),
            style="lines",
        ),
    ]


def headline(run: Run) -> list[tuple[str, str, str]]:
    """Return the overall figures of the run, each a title, a value and a remark."""
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
