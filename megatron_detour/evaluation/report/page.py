"""The report of an evaluation: Markdown, a self-contained HTML page, a plot, all figures as JSON, terminal output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_detour.errors import DetourError, nearest
from megatron_detour.evaluation.models import fingerprint
from megatron_detour.evaluation.report.load_results import read_evaluation
from megatron_detour.evaluation.report.statistics import Spread
from megatron_detour.evaluation.report.summary import PERMUTATIONS, SUMMARY_FORMAT, summarize
from megatron_detour.evaluation.report.tables import (
    Summary,
    against_table,
    comparisons_words,
    interval_words,
    p_words,
    points,
    scores_table,
    tables,
)
from megatron_detour.evaluation.results import read_results
from megatron_detour.files import write_whole
from megatron_detour.structured import read_json_object
from megatron_detour.text import markdown, visible
from megatron_detour.ui.format import counted

if TYPE_CHECKING:
    from rich.console import Console

PAGE, TEXT, FIGURES = "report.html", "report.md", "summary.json"
TEMPLATE = "evaluation.html.j2"


def write_report(output: Path, baseline: str | None = None, permutations: int = PERMUTATIONS) -> Path:
    """Write scores.png, report.md, report.html and summary.json into OUTPUT; return the page's path.

    `baseline` is the model that the other models are compared with, by default the first. Raises DetourError if
    results are missing or not comparable.
    """
    from megatron_detour.evaluation.report import plots
    from megatron_detour.ui.page import Picture, write_pictures

    output = Path(output)
    summary = summarize(output, baseline, permutations)
    picture = Picture.from_figure(
        plots.FILE, plots.TITLE, plots.CAPTION, plots.draw_scores(summary), plots.describe(summary)
    )
    write_pictures([picture], output)
    write_whole(output / TEXT, _markdown(summary, picture.file if picture.content else ""))
    write_whole(output / PAGE, _page(summary, picture))
    write_whole(output / FIGURES, json.dumps(summary, ensure_ascii=False, indent=1, allow_nan=False) + "\n")
    return output / PAGE


def read_summary(output: Path) -> Summary:
    """Read summary.json, as written by write_report. Raises DetourError for a missing or damaged file."""
    path = Path(output) / FIGURES
    if not path.is_file():
        raise DetourError(f"{path}: no such file; write the report first (megatron-detour evaluate report {output})")
    try:
        summary = read_json_object(path)
    except DetourError as fault:
        raise DetourError(f"{fault}; write the report again (megatron-detour evaluate report {output})") from None
    if summary.get("format") != SUMMARY_FORMAT:
        raise DetourError(
            f"{path}: written by another version; write the report again (megatron-detour evaluate report {output})"
        )
    return summary


def model_table(output: Path, model: str) -> list[dict[str, Any]]:
    """Return a model's scores for a model card, per task: task, title, language, metric, protocol, mean, sd (None for
    one seed), seeds.

    Mean and sd are fractions, `seeds` is a count. Raises DetourError if the evaluation has no such model, or no
    finished task of it.
    """
    evaluation = read_evaluation(Path(output))
    known = [*evaluation.models, *evaluation.shuffled_models]
    if model not in known:
        raise DetourError(
            f"{output}: the evaluation has no model {model!r}{nearest(model, known)}; choose from {', '.join(known)}"
        )
    rows = []
    for task in evaluation.tasks:
        if scores := evaluation.scores(model, task.name):
            spread = Spread.from_values(list(scores.values()))
            facts = {key: getattr(task, key) for key in ("title", "language", "metric")}
            facts |= {"task": task.name, "protocol": evaluation.protocol}
            rows.append(facts | {"mean": spread.mean, "sd": spread.sd, "seeds": spread.count})
    if not rows:
        raise DetourError(f"{output}: the evaluation has no finished task of {model!r}; evaluate it first")
    return rows


def scored_folder(output: Path, model: str) -> Path | None:
    """Return the folder of the evaluated model; None if it is missing or has changed since."""
    results = [result for cell, result in read_results(Path(output)).items() if cell.model == model]
    folder = Path(results[-1].get("path", ""))
    try:
        same = fingerprint(folder) == results[-1].get("identity", {}).get("model")
    except OSError:
        return None
    return folder if same else None


def as_text(summary: Summary, console: Console) -> None:
    """Print the verdict, scores, differences from the baseline, and notes."""
    console.print(visible(summary["verdict"]), style="bold", markup=False, highlight=False)
    for table in (scores_table(summary), against_table(summary)):
        if table.rows:
            table.print(console)
    if len(summary["models"]) > 1:
        console.print(visible(comparisons_words(summary)), markup=False, highlight=False)
    for note in summary["notes"]:
        console.print(visible(f"Note: {note}"), style="yellow", markup=False, highlight=False)


# ------------------------------------------------------------------------------------------------ pages


def _about(summary: Summary) -> str:
    tasks, seeds = counted(len(summary["tasks"]), "task"), summary["seeds"]
    shown = f"seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}" if seeds else "shuffled labels only"
    return f"{tasks}, {shown}, protocol {summary['protocol']}."


def _page(summary: Summary, picture: Any) -> str:
    from megatron_detour.ui.colors import variable
    from megatron_detour.ui.figures import appearance
    from megatron_detour.ui.page import render

    return render(
        TEMPLATE,
        Path(__file__).parent,
        verdict=summary["verdict"],
        about=_about(summary),
        chips={model: variable(appearance(number)["color"]) for number, model in enumerate(summary["models"])},
        cards=[_card(comparison, summary) for comparison in summary["against_baseline"] if comparison["cells"]],
        notes=summary["notes"],
        tables=tables(summary),
        picture=picture if picture.content else None,
        versions=summary["versions"],
    )


def _card(comparison: dict[str, Any], summary: Summary) -> dict[str, str]:
    methods = [("by tasks", comparison["by_tasks"]), ("by cells", comparison["cells"])]
    return {
        "title": f"{comparison['model']} compared with {summary['baseline']}",
        "value": f"{points(comparison['cells']['mean'])} points",
        "remark": "; ".join(f"95% {interval_words(each)} {name}, p {p_words(each['p'])}" for name, each in methods),
    }


def _markdown(summary: Summary, picture: str) -> str:
    parts = ["# Evaluation", f"**{markdown(summary['verdict'])}**", _about(summary)]
    if summary["notes"]:
        parts.append("\n".join(f"- {markdown(note)}" for note in summary["notes"]))
    for number, table in enumerate(tables(summary)):
        parts.append(f"## {markdown(table.title)}")
        parts.append(table.markdown())
        parts += [markdown(remark) for remark in table.remarks]
        if not number and picture:
            parts.append(f"![Scores by task, and differences from the baseline]({picture})")
    if summary["versions"]:
        parts.append("Versions: " + ", ".join(f"{name} {version}" for name, version in summary["versions"].items()))
    return "\n\n".join(parts) + "\n"
