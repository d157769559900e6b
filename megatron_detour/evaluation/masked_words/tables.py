"""The figures of masked words as tables, in Markdown and on the terminal."""

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
    "Words are masked at the same places for every model, all tokens of a word and all words of a window at once. In "
    "brackets: the 95% interval of a bootstrap over documents, of 20 or more. Ratios and differences are of the same "
    "documents."
)

Line = dict[str, Any]


def say(sentence: str) -> None:
    print(visible(sentence), file=sys.stderr, flush=True)


def as_markdown(lines: list[Line]) -> str:
    """All figures, corpus by corpus."""
    parts = ["# Restoring masked words", NOTE]
    for corpus, own in _grouped(lines, "corpus").items():
        parts += [f"## {markdown(corpus)}", f"{_facts(own[0])}.", _figures(own).markdown()]
        parts += [f"{markdown(sentence)}." for sentence in _unknown(own)]
        for baseline, changed in _grouped(own, "compared_with").items():
            parts += [f"Against {markdown(baseline)}:", _changes(changed).markdown()]
    return "\n\n".join(parts) + "\n"


def print_tables(lines: list[Line], console: Console | None = None) -> None:
    """Prints a table of figures for each corpus, and one of differences where there are several models."""
    console = console or Console()
    for corpus, own in _grouped(lines, "corpus").items():
        console.print(Text(visible(f"{corpus}: {_facts(own[0])}")))
        _figures(own).print(console)
        for sentence in _unknown(own):
            console.print(Text(visible(f"{sentence}.")))
        for baseline, changed in _grouped(own, "compared_with").items():
            console.print(Text(visible(f"{corpus}, against {baseline}")))
            _changes(changed).print(console)


def _grouped(lines: list[Line], key: str) -> dict[str, list[Line]]:
    found: dict[str, list[Line]] = {}
    for line in lines:
        if line[key] is not None:
            found.setdefault(line[key], []).append(line)
    return found


def _facts(line: Line) -> str:
    words, domain = line["all"]["words"], ""
    if line["domain"] is not None:
        domain = f", {line['domain']['words']:,} of them domain words ({line['domain_words']:,} such words are known)"
    return f"{line['documents']:,} documents, {line['windows']:,} windows, {words:,} masked words{domain}"


def _unknown(lines: list[Line]) -> list[str]:
    """Models whose tokenizers cannot write all words: guessing the unknown token is easier than guessing a word."""
    return [
        f"{line['model']}: {line['all']['unknown']:,} of the masked words are unknown to the tokenizer in whole or part"
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
    """The value, and its interval below it, as side by side they are wider than a terminal."""
    interval = "" if figure["low"] is None else f"[{figure['low']:{form}}, {figure['high']:{form}}]"
    return Entry(f"{figure['value']:{form}}", note=interval)
