"""Tables of masked-word figures, as Markdown and for the terminal."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from megatron_detour.text import markdown, visible
from megatron_detour.ui.tables import Entry, Table

HEAD = ("Model", "Words", "Masked", "Perplexity per word", "Bits per byte", "Accuracy")
CHANGE_HEAD = ("Model", "Words", "Perplexity, ratio", "Bits per byte, difference", "Accuracy, points")
NOTE = (
    "The same words are masked for every model, all tokens of a word and all chosen words of a window at once. In "
    "brackets: the 95% bootstrap interval over documents, if there are at least 20. Ratios and differences are paired "
    "by document."
)

Line = dict[str, Any]


def warn(sentence: str) -> None:
    print(visible(sentence), file=sys.stderr, flush=True)


def as_markdown(lines: list[Line]) -> str:
    """Return all figures by corpus."""
    parts = ["# Restoring masked words", NOTE]
    for corpus, own in _grouped(lines, "corpus").items():
        parts += [f"## {markdown(corpus)}", f"{_facts(own[0])}.", _figures(own).markdown()]
        parts += [f"{markdown(sentence)}." for sentence in _unknown(own)]
        for baseline, changed in _grouped(own, "compared_with").items():
            parts += [f"Compared with {markdown(baseline)}:", _changes(changed).markdown()]
    return "\n\n".join(parts) + "\n"


def print_tables(lines: list[Line], console: Console | None = None) -> None:
    """Print a table of figures per corpus, and one of differences if there are several models."""
    console = console or Console()
    for corpus, own in _grouped(lines, "corpus").items():
        console.print(Text(visible(f"{corpus}: {_facts(own[0])}")))
        _figures(own).print(console)
        for sentence in _unknown(own):
            console.print(Text(visible(f"{sentence}.")))
        for baseline, changed in _grouped(own, "compared_with").items():
            console.print(Text(visible(f"{corpus}, compared with {baseline}")))
            _changes(changed).print(console)


def _grouped(lines: list[Line], key: str) -> dict[str, list[Line]]:
    groups: dict[str, list[Line]] = {}
    for line in lines:
        if line[key] is not None:
            groups.setdefault(line[key], []).append(line)
    return groups


def _facts(line: Line) -> str:
    words, domain = line["all"]["words"], ""
    if line["domain"] is not None:
        domain = f", {line['domain']['words']:,} of them domain words (of a list of {line['domain_words']:,})"
    return f"{line['documents']:,} documents, {line['windows']:,} windows, {words:,} masked words{domain}"


def _unknown(lines: list[Line]) -> list[str]:
    """Name models whose tokenizers lack some words: predicting the unknown token is easier than predicting a word."""
    return [
        f"{line['model']}: {line['all']['unknown']:,} of the masked words are wholly or partly unknown to the tokenizer"
        for line in lines
        if line["all"]["unknown"]
    ]


def _figures(lines: list[Line]) -> Table:
    rows = [
        (
            line["model"],
            kind,
            f"{line[kind]['words']:,}",
            _interval(line[kind]["perplexity"], ",.1f" if line[kind]["perplexity"]["value"] < 1000 else ",.0f"),
            _interval(line[kind]["bits_per_byte"], ".3f"),
            _interval(line[kind]["accuracy"], ".1%"),
        )
        for kind in ("all", "domain")
        for line in lines
        if line[kind] is not None
    ]
    return Table(HEAD, rows, "llr", names=2)


def _changes(lines: list[Line]) -> Table:
    rows = [
        (
            line["model"],
            kind,
            _interval(line["change"][kind]["perplexity"], ".3g"),
            _interval(line["change"][kind]["bits_per_byte"], "+.3f"),
            _interval(
                {name: share and 100 * share for name, share in line["change"][kind]["accuracy"].items()}, "+.1f"
            ),
        )
        for kind in ("all", "domain")
        for line in lines
        if kind in line["change"]
    ]
    return Table(CHANGE_HEAD, rows, "llr", names=2)


def _interval(figure: dict[str, float | None], form: str) -> Entry:
    """Return the value with its interval below it; side by side they are wider than a terminal."""
    interval = "" if figure["low"] is None else f"[{figure['low']:{form}}, {figure['high']:{form}}]"
    return Entry(f"{figure['value']:{form}}", note=interval)
