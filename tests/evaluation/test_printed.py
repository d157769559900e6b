"""What an evaluation prints on a terminal of 80 columns: no line is longer, and no word or figure breaks."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from megatron_detour.commands.evaluate import list_tasks
from megatron_detour.evaluation.masked_words.tables import print_tables
from megatron_detour.evaluation.report.page import as_text
from megatron_detour.evaluation.report.summary import summarize
from tests.evaluation.evaluations import MadeUp, make_evaluation

MODELS = ["base", "modernbert-bio-base-10B-step-00000700", "ModernBERT-large-a-name-of-a-hospital/2"]
FIGURE = {"value": 123.4, "low": 100.0, "high": 156.7}
FIGURES = {"words": 1_234_567, "unknown": 3, "perplexity": FIGURE, "bits_per_byte": FIGURE, "accuracy": FIGURE}


def line_of(model: str) -> dict:
    facts = {"model": model, "corpus": "notes.jsonl", "documents": 20, "windows": 40, "domain_words": 9}
    compared = {"compared_with": None if model == MODELS[0] else MODELS[0]}
    change = {kind: dict.fromkeys(("perplexity", "bits_per_byte", "accuracy"), FIGURE) for kind in ("all", "domain")}
    return facts | compared | {"all": FIGURES, "domain": FIGURES, "change": change}


def evaluation(tmp_path, console: Console) -> None:
    tasks = [MadeUp("casimedicos_mcq_en", "token-classification", 20), MadeUp("rct_sections", examples=20)]
    skills = {model.replace("/", "-"): 0.5 for model in MODELS}
    as_text(summarize(make_evaluation(tmp_path, tasks, skills), None, 50), console)


def masked_words(tmp_path, console: Console) -> None:
    print_tables([line_of(model) for model in MODELS], console)


@pytest.mark.parametrize("show", [evaluation, masked_words])
def test_tables_fit_eighty_columns_and_break_no_word(show, tmp_path):
    wide, narrow = (Console(file=io.StringIO(), width=width) for width in (400, 80))
    show(tmp_path / "wide", wide)
    show(tmp_path / "narrow", narrow)
    lines = narrow.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert set(wide.file.getvalue().split()) == set(narrow.file.getvalue().split())


def test_the_list_of_tasks_fits(capsys):
    list_tasks()
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
