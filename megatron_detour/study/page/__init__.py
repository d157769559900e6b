"""The page of a study, a pure function of its registration.json and results.jsonl."""

from __future__ import annotations

from pathlib import Path

from megatron_detour.files import write_whole
from megatron_detour.study.data import StudyData
from megatron_detour.study.page import tables
from megatron_detour.study.page.methods import latex_table, methods_paragraph
from megatron_detour.study.page.plots import Plot, draw_all
from megatron_detour.study.page.sections import Section, could_find, other_versions, sections, state, verdict
from megatron_detour.study.records import REGISTRATION
from megatron_detour.text import markdown, visible
from megatron_detour.ui.figures import png, svg_file
from megatron_detour.ui.page import Picture, render

PAGE, TEXT, PICTURES = "study.html", "study.md", "study"
METHODS, LATEX = "methods.txt", "table.tex"
TEMPLATE = "study.html.j2"
PLOTS = ("differences", "curves", "drift", "drift_ratio", "persistence", "decay_sweep", "transplants")
SUFFIXES = (".png", ".svg", ".csv")


def write_page(folder: Path, output: Path | None = None) -> Path:
    """Write study.html and study.md, and into study/ the plots (PNG, SVG, CSV), methods.txt and table.tex.

    `folder` has registration.json and results.jsonl; `output` is `folder` by default. Returns the path of study.html.
    Raises DetourError, before anything is written, for missing or damaged files.
    """
    data, output = StudyData.read(Path(folder)), Path(output or folder)
    plots = draw_all(data)
    shown = [section for section in sections(data) if section.has_content(plots)]
    methods, table = methods_paragraph(data), latex_table(data)
    aside = output / PICTURES
    aside.mkdir(parents=True, exist_ok=True)
    for name in PLOTS:
        _write_plot(aside, name, plots.get(name))
    write_whole(aside / METHODS, methods + "\n")
    _write_or_remove(aside / LATEX, table)
    write_whole(output / TEXT, _markdown(data, shown, plots, methods))
    # the drawing for the page makes the figures' background transparent, so it comes last
    pictures = {name: Picture.from_figure(name, plot.title, plot.caption, plot.figure) for name, plot in plots.items()}
    write_whole(output / PAGE, _page(data, shown, pictures, methods, table))
    return output / PAGE


def _write_plot(folder: Path, name: str, plot: Plot | None) -> None:
    """Write a plot and its data, or remove those of earlier results."""
    if plot is None:
        for suffix in SUFFIXES:
            (folder / f"{name}{suffix}").unlink(missing_ok=True)
        return
    write_whole(folder / f"{name}.png", png(plot.figure))
    write_whole(folder / f"{name}.svg", svg_file(plot.figure, name))
    write_whole(folder / f"{name}.csv", plot.csv())


def _write_or_remove(path: Path, content: str) -> None:
    if content:
        write_whole(path, content)
    else:
        path.unlink(missing_ok=True)


def _page(data: StudyData, shown: list[Section], pictures: dict[str, Picture], methods: str, latex: str) -> str:
    classes = {"Met": "", "Contradicted": "failed", "Not met": "failed"}
    table = tables.verdicts_table(data)
    judged = [
        (classes.get(tables.outcome(found), "open"), *(cell for cell in row))
        for found, row in zip(data.verdicts.values(), table.rows, strict=True)
    ]
    return render(
        TEMPLATE,
        Path(__file__).parent,
        registration=data.registration,
        versions=data.versions,
        verdict=verdict(data),
        verdicts=judged,
        remarks=table.remarks,
        other_versions=other_versions(data),
        state=state(data),
        could_find=could_find(data),
        registered=registered(data),
        sections=shown,
        pictures=pictures,
        methods=methods,
        latex=visible(latex),
    )


def registered(data: StudyData) -> str:
    """Return when the study was registered, and how its hash begins, in a sentence."""
    found = data.registration
    when = found.registered.replace("T", " ").replace("Z", " UTC")
    digits = f"SHA-256 {found.sha256[: tables.DIGITS]}…, in full in {REGISTRATION}"
    return f"Registered {when}, before the first result ({digits})."


def _markdown(data: StudyData, shown: list[Section], plots: dict[str, Plot], methods: str) -> str:
    registration = data.registration
    parts = [f"# {markdown(registration.name)}", markdown(registration.about), f"**{markdown(verdict(data))}**"]
    judged = tables.verdicts_table(data)
    parts += [judged.markdown(), *map(markdown, judged.remarks)] if judged.rows else []
    parts += [markdown(registered(data)), _amendments_text(data)]
    parts += [markdown(other_versions(data)), markdown(state(data))]
    parts += [f"What the study could find: {markdown(sentence)}" for sentence in [could_find(data)] if sentence]
    for section in shown:
        parts += [f"## {markdown(section.title)}", markdown(section.reading), *_section_text(section, plots)]
    parts += ["## Methods", markdown(methods)]
    if data.versions:
        named = ", ".join(f"{package} {' and '.join(own)}" for package, own in data.versions.items())
        parts.append(f"Versions: {markdown(named)}.")
    return "\n\n".join(filter(None, parts)) + "\n"


def _section_text(section: Section, plots: dict[str, Plot]) -> list[str]:
    parts: list[str] = []
    if section.plot in plots:
        plot = plots[section.plot]
        files = f"[SVG]({PICTURES}/{plot.file}.svg), [data]({PICTURES}/{plot.file}.csv)"
        parts += [f"![{markdown(plot.title)}]({PICTURES}/{plot.file}.png)", f"{markdown(plot.caption)} {files}"]
    for table in (table for table in section.tables if table.rows):
        parts += [f"**{markdown(table.title)}**"] if table.title else []
        parts += [table.markdown(), *map(markdown, table.remarks)]
    return parts + [markdown(remark) for remark in section.remarks]


def _amendments_text(data: StudyData) -> str:
    amendments = data.registration.amendments
    if not amendments:
        return "Not changed since."
    lines = ["**Changed after the registration:**", ""]
    for amendment in amendments:
        lines.append(f"- {markdown(amendment.when)}: {markdown(amendment.reason)}")
        lines += [f"  - {markdown(change)}" for change in amendment.changes]
    return "\n".join(lines)
