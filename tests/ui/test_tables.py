"""Tables on a terminal: no line is longer than it is wide, and nothing is lost."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from megatron_detour.ui.tables import Entry, Formatted, Table

FIGURE = "50.0 ± 1.0"


def test_what_does_not_fit_stands_below() -> None:
    console = Console(file=io.StringIO(), width=40)
    headers = ["Task", *(f"model {n}" for n in range(5))]
    Table(headers, [["hoc", *[FIGURE] * 5]], title="Scores").print(console)
    assert console.file.getvalue().count("hoc") == 2 and console.file.getvalue().count(FIGURE) == 5


@pytest.mark.parametrize("long", ["many words " * 15, "one-word-with-marks/" * 8, "n" * 150])
@pytest.mark.parametrize("place", ["header of names", "header", "name", "figure"])
def test_whatever_is_long_breaks_and_stays_whole(long: str, place: str) -> None:
    header = [long if place == "header of names" else "Task", long if place == "header" else "Score", "Other"]
    row = [long if place == "name" else "hoc", long if place == "figure" else FIGURE, FIGURE]
    shown = Table(header, [row]).text()
    assert max(map(len, shown.splitlines())) <= 80
    letters = [sum(map(text.count, long.strip())) for text in (shown, " ".join([*header, *row]))]
    assert letters[0] >= letters[1] and FIGURE in shown


def test_a_long_header_is_not_a_tower() -> None:
    shown = Table(["", "after a very long name of the first phase"], [["MLM loss", "2.6"]]).text()
    assert len(shown.splitlines()) <= 5


def test_a_table_as_text_has_no_controls_no_markup_and_no_head_that_is_empty() -> None:
    shown = Table(["", ""], [["[red]a\x1b", "1\n"], ["b", "12"]]).text()
    assert shown == "[red]a\\x1b   1\nb           12"


def test_a_table_as_markdown() -> None:
    rows = [["a|b", Entry("1", bold=True, note="[0, 2]")], ["c\nd", Formatted("[2](x)")]]
    assert Table(["", "n"], rows).markdown().splitlines() == [
        "|  | n |",
        "| --- | ---: |",
        "| a\\|b | **1 \\[0, 2\\]** |",
        "| c d | [2](x) |",
    ]


def test_texts_of_figures_have_a_width_of_their_own() -> None:
    words = "rises to 0.0002 over 100M tokens, then follows one minus square root to 2e-05"
    shown = Table(["phase", "rate", "steps"], [["decay", words, "12"]], align="llr").text()
    assert len(shown.splitlines()) == 3 and shown.splitlines()[1].endswith("12")
