"""Compare several runs, such as a detour and its control: plots and a self-contained HTML page."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_detour.errors import DetourError
from megatron_detour.files import write_whole
from megatron_detour.objectives import read_objective
from megatron_detour.observe.plots import PLOTS
from megatron_detour.observe.report import headline
from megatron_detour.observe.run_folder import Run, read_run, validation_rows
from megatron_detour.observe.sinks import Record
from megatron_detour.observe.verdict import verdict
from megatron_detour.structured import parse_yaml
from megatron_detour.text import visible
from megatron_detour.ui.colors import variable
from megatron_detour.ui.figures import appearance
from megatron_detour.ui.format import compact, frozen_words
from megatron_detour.ui.page import Picture, render, write_pictures
from megatron_detour.ui.tables import ABSENT, Entry, Table, wrapped

PAGE = "compare.html"
MARK = '<meta name="generator" content="megatron_detour comparison of runs">'
UNIQUE_KEYS = ("name", "folder")  # keys of a run file that differ between any two runs
OF_VALIDATION = ("sequences", "seed", "mask_rate", "sequence_length")


def write_comparison(folders: list[Path], output: Path) -> tuple[Path, str]:
    """Plot the runs of `folders` together: write PNG files and compare.html into `output`.

    Returns the page's path, and the verdict and the validation figures as text for a terminal.

    Unfinished runs are shown up to their last step. All runs are compared with the first. Raises DetourError for fewer
    than two runs, a duplicate or invalid run directory, and an existing output that is not an earlier comparison.
    """
    folders, output = [Path(folder) for folder in folders], Path(output)
    if len(folders) < 2:
        raise DetourError("give at least two run directories to compare")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise DetourError("the same run directory twice; give each run once")
    runs = [read_run(folder) for folder in folders]
    labels, settings = _labels(runs), [_settings(run) for run in runs]
    _take(output)
    drawn = [f"{number}: {label}" for number, label in enumerate(labels, start=1)]
    pictures = [
        Picture.from_figure(plot.file, plot.title, plot.compared, plot.draw(runs, drawn))
        for plot in PLOTS
        if plot.compared
    ]
    # Write the page first: it marks the folder as a comparison.
    write_whole(output / PAGE, _page(runs, labels, settings, pictures))
    write_pictures(pictures, output)
    return output / PAGE, _as_text(runs, labels, settings)


def _take(output: Path) -> None:
    """Create the folder. Raises DetourError if it contains anything but an earlier comparison."""
    page = output / PAGE
    if output.exists() and not output.is_dir():
        raise DetourError(f"{output} is a file; choose another --output")
    if output.exists() and any(output.iterdir()) and not (page.exists() and MARK in page.read_text(encoding="utf-8")):
        raise DetourError(f"{output} contains files other than an earlier comparison; choose another --output")
    output.mkdir(parents=True, exist_ok=True)


def _labels(runs: list[Run]) -> list[str]:
    """Return the names of the runs; for shared names, with the distinguishing part of their folders."""
    names = [run.name for run in runs]
    for place in (lambda run: run.folder.name, lambda run: str(run.folder)):
        labels = [f"{run.name} ({place(run)})" if names.count(run.name) > 1 else run.name for run in runs]
        if len(set(labels)) == len(runs):
            break
    return labels


def _page(runs: list[Run], labels: list[str], settings: list[dict[str, Any]], pictures: list[Picture]) -> str:
    verdicts = _verdicts(runs, labels, settings)
    drawn = [f"{number}: {label}" for number, label in enumerate(labels, start=1)]
    return render(
        "compare.html.j2",
        Path(__file__).parent,
        mark=MARK,
        runs=list(zip(runs, drawn, strict=True)),
        colors={label: variable(appearance(number)["color"]) for number, label in enumerate(drawn)},
        pictures=pictures,
        verdict=verdict(runs, labels, verdicts),
        verdicts=verdicts,
        figures=_figures(runs, drawn),
        cost=Table(["", *drawn], _totals(runs)),
        settings=Table(["", *drawn], _differing([_flat(own, UNIQUE_KEYS) for own in settings]), align="l"),
        versions=Table(["", *drawn], _differing([_software(run) for run in runs]), align="l"),
    )


def _as_text(runs: list[Run], labels: list[str], settings: list[dict[str, Any]]) -> str:
    verdicts = _verdicts(runs, labels, settings)
    numbers = [str(number) for number in range(1, len(runs) + 1)]
    named = [f"{number}: {visible(label)}" for number, label in zip(numbers, labels, strict=True)]
    said = [f"{answer}: {text}" for answer, text in verdicts if answer != "Yes"]
    tables = [table.text() for table in _figures(runs, numbers)]
    return "\n\n".join([wrapped(verdict(runs, labels, verdicts)), "\n".join(named), *map(wrapped, said), *tables])


def _verdicts(runs: list[Run], labels: list[str], settings: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return _data_verdicts(runs, labels) + _validation_verdicts(runs, labels, settings)


def _settings(run: Run) -> dict[str, Any]:
    content = parse_yaml(run.run_file, str(run.folder / "run.yaml"))
    if not isinstance(content, dict):
        raise DetourError(f"{run.folder / 'run.yaml'}: no settings; restore the file")
    return content


def _phase(phase: dict[str, Any]) -> str:
    parts = [read_objective(phase).describe(), f"{compact(phase['tokens'])} tokens"]
    if phase.get("freeze"):
        parts.append(f"{frozen_words(phase)} frozen")
    return f"{phase['name']}: {', '.join(parts)}"


def _totals(runs: list[Run]) -> list[list[str | Entry]]:
    """Return rows with the phases and the overall figures of the runs."""
    facts = [{title: value for title, value, _ in headline(run)} for run in runs]
    phases = [Entry("\n".join(map(_phase, run.phases)), style="wrap lines") for run in runs]
    titles = dict.fromkeys(title for own in facts for title in own)
    rows = [[title, *(own.get(title, ABSENT) for own in facts)] for title in titles]
    return [["Phases", *phases], *rows, ["Skipped updates", *(f"{len(run.skipped):,}" for run in runs)]]


def _data_verdicts(runs: list[Run], labels: list[str]) -> list[tuple[str, str]]:
    """Return whether each run read the same documents as the first, step by step, by checksums."""
    first = runs[0].steps
    verdicts = []
    for run, label in zip(runs[1:], labels[1:], strict=True):
        own, pair = run.steps, f"{label} and {labels[0]}"
        _, rows, own_rows = np.intersect1d(first.numbers, own.numbers, assume_unique=True, return_indices=True)
        sums, own_sums = first["data_crc"][rows], own["data_crc"][own_rows]
        there = ~np.isnan(sums) & ~np.isnan(own_sums)
        same = (sums == own_sums) & (first["tokens"][rows] == own["tokens"][own_rows])
        steps = int(there.sum())
        if not steps:
            verdicts.append(
                ("Unknown", f"cannot verify that {pair} read the same data: no common step has a checksum.")
            )
        elif same[there].all():
            verdicts.append(("Yes", f"{pair} read the same documents in all {steps:,} common steps."))
        else:
            text = (
                f"{pair} did not read the same documents: {int(same[there].sum()):,} of {steps:,} steps are "
                f"equal; the first different one is step {first.numbers[rows][there & ~same][0]:,}."
            )
            verdicts.append(("No", text))
    return verdicts


def _validation_verdicts(runs: list[Run], labels: list[str], settings: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return whether each run was validated like the first, so that their figures are comparable."""
    first, *others = [_validation(run, own) for run, own in zip(runs, settings, strict=True)]
    verdicts = []
    for facts, label in zip(others, labels[1:], strict=True):
        pair = f"{label} and {labels[0]}"
        differing = [key for key in facts if facts[key] != first[key]]
        if not facts["corpora"] or not first["corpora"]:
            verdicts.append(("Unknown", f"{pair} do not both record their validation corpora."))
        elif differing:
            text = (
                f"{pair} were validated differently, so their figures are not comparable. "
                f"Differences: {', '.join(differing)}."
            )
            verdicts.append(("No", text))
        else:
            verdicts.append(("Yes", f"{pair} were validated on the same text under the same masks."))
    return verdicts


def _validation(run: Run, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what determines the tokens of validation."""
    corpora = run.environment.get("validation_corpora") or []
    own, data = (part if isinstance(part, dict) else {} for part in (settings.get("validation"), settings.get("data")))
    return {
        "corpora": [corpus.get("sha256") or corpus.get("prefix") for corpus in corpora],
        "tokenizer": [corpus.get("tokenizer_sha256") for corpus in corpora],
        **{f"validation.{key}": own.get(key) for key in OF_VALIDATION},
        "data.sequence_length": data.get("sequence_length"),
    }


def _figures(runs: list[Run], headers: list[str]) -> list[Table]:
    """Return validation figures at the token counts where all runs ended a phase, and at the end of each run."""
    at = [{run.tokens_at(b.record["step"]): b.record for b in run.boundaries() if b.ends_phase} for run in runs]
    common = sorted(set(at[0]).intersection(*at[1:]))
    tables = [_figures_table(_title(tokens), headers, [records[tokens] for records in at]) for tokens in common]
    last = [run.validations[-1] if run.validations else {} for run in runs]
    ends = [run.tokens_at(record["step"]) if record else None for run, record in zip(runs, last, strict=True)]
    if len(set(ends)) > 1 or ends[0] not in common:
        reached = ", ".join(ABSENT if end is None else compact(end) for end in ends)
        title = f"Latest of each run (at {reached} tokens)"
        tables.append(_figures_table(title, headers, last, compared=len(set(ends)) == 1))
    return [table for table in tables if table.rows]


def _title(tokens: int) -> str:
    return f"At {compact(tokens)} tokens" if tokens else "Before training"


def _figures_table(title: str, headers: list[str], records: list[Record], compared: bool = True) -> Table:
    """`compared`: whether to show differences from the first run."""
    rows = []
    for row in validation_rows(records):
        first, *others = row.values
        changes = ["" if None in (first, other) else row.figure.change(other - first) for other in others]
        title_cell = Entry(row.title, style=f"{row.figure.objective}-text")
        rows.append([title_cell, *row.texts(ABSENT), *(changes if compared else [])])
    changed = [f"{number} minus 1" for number in range(2, len(records) + 1)] if compared else []
    return Table(["", *headers, *changed], rows, title=title)


def _flat(content: Any, left_out: Iterable[str] = (), prefix: str = "") -> dict[str, str]:
    """Return the settings by dotted key, without those that are null, as those of another objective are absent.

    Phases are keyed by name, other lists by index.
    """
    if isinstance(content, list) and content and all(isinstance(entry, dict) for entry in content):
        content = {entry.get("name", number): entry for number, entry in enumerate(content)}
    if not isinstance(content, dict) or not content:
        return {prefix: _setting(content)}
    flat = {}
    for key, value in content.items():
        if key not in left_out and value is not None:
            flat |= _flat(value, (), f"{prefix}.{key}" if prefix else str(key))
    return flat


def _setting(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _software(run: Run) -> dict[str, str]:
    """Return versions, and the environment of the latest session."""
    facts = {str(package): str(version) for package, version in (run.environment.get("versions") or {}).items()}
    for key in ("device", "ranks", "tensor_parallel", "attention", "kernels", "dtype", "recompute", "compile"):
        if run.sessions and key in run.sessions[-1]:
            facts[key.replace("_", " ")] = _setting(run.sessions[-1][key])
    return facts


def _differing(facts: list[dict[str, str]]) -> list[list[str]]:
    """Return the keys whose values differ, with the values."""
    keys = dict.fromkeys(key for own in facts for key in own)
    rows = [[key, *(own.get(key, ABSENT) for own in facts)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]
