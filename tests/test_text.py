from __future__ import annotations

import io
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_detour import errors
from megatron_detour.commands.machine import NOTE, CheckResult
from megatron_detour.corpus import progress as build_progress
from megatron_detour.evaluation import probes
from megatron_detour.evaluation.finetuning.progress import SuiteProgress
from megatron_detour.evaluation.masked_words import tables
from megatron_detour.evaluation.report import plots as evaluation_plots
from megatron_detour.evaluation.results import Cell
from megatron_detour.observe import compare, plots, report
from megatron_detour.observe.progress import RunProgress
from megatron_detour.observe.run_folder import read_run
from megatron_detour.text import markdown, visible
from megatron_detour.ui.progress import CountProgress
from tests.observe.runs import FREEZE, make_run
from tests.observe.shown import texts_of

HOSTILE = "a\x1b]0;owned\x07\x9b31mb\u202edrowssap\u2066\u200b\u2028\x7f\r\ufeff"


def unseen(text: str) -> str:
    return "".join(c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Cs") and c not in "\n\t")


def test_what_is_not_seen_becomes_a_code() -> None:
    assert visible("\x1b[31m é\u202e\U000e0041\udcff\n\t") == "\\x1b[31m é\\u202e\\U000e0041\\udcff\n\t"
    assert visible("نص 👩\u200d⚕️ می\u200cخواهم") == "نص 👩\u200d⚕️ می\u200cخواهم"
    seen = (c for c in map(chr, range(0x110000)) if c not in "\u200c\u200d")
    assert {c for c in seen if unseen(visible(c))} <= {  # signs of numbers and scripts, which stand before their text
        c for c in map(chr, range(0x110000)) if unicodedata.category(c) == "Cf"
    } - set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("mit", "mit"),
        ("# <script>\n---\nlicense: mit\n---", "\\# \\<script\\> --- license: mit ---"),
        ("---", "--\\-"),
        ("1. first", "1\\. first"),
        ("1.5", "1.5"),
        ("snake_case _a_ b__c", "snake_case \\_a\\_ b\\_\\_c"),
        ("-0.5", "-0.5"),
        ("a | [b](c) `d` *e*", "a \\| \\[b\\](c) \\`d\\` \\*e\\*"),
        ("x\u202e", "x\\\\u202e"),
        ("&lt;b> &amp;", "\\&lt;b\\> \\&amp;"),
    ],
)
def test_markdown_shows_text_as_it_stands(text: str, shown: str) -> None:
    assert markdown(text) == shown


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A run whose names steer terminals."""
    phases = [(HOSTILE, "mlm", 0.3, 20, {"freeze": [HOSTILE]}), ("x", "clm", None, 100, FREEZE)]
    folder = make_run(tmp_path / "run", phases, name=HOSTILE)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[0] |= {f"val_mlm_loss/{HOSTILE}": 2.0}
    lines[5] |= {"spike": HOSTILE}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    environment = json.loads((folder / "environment.json").read_text())
    environment["corpora"][0]["prefix"] = environment["versions"]["x"] = environment["model"]["y"] = HOSTILE
    environment["sessions"][0]["device"] = HOSTILE
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


def test_pages_and_terminals_show_names_as_codes(hostile: Path) -> None:
    run = read_run(hostile)
    html = report._page(run, [])
    assert not unseen(html) and "\\x1b]0;owned" in html and "\\u202edrowssap" in html
    other = compare._page([run, run], [HOSTILE, "b"], [{"a": HOSTILE}, {}], [])
    assert not unseen(other) and "\\u202edrowssap" in other
    for text in (report.as_text(hostile), compare._as_text([run, run], [HOSTILE, "b"], [{}, {}])):
        assert not unseen(text) and "\\x1b]0;owned" in text


def test_plots_show_names_as_codes(hostile: Path) -> None:
    run = read_run(hostile)
    figures = [plot.draw([run], [HOSTILE]) for plot in plots.PLOTS]
    figures += [plot.draw([run, run], [HOSTILE, "b"]) for plot in plots.PLOTS if plot.compared]
    texts = [text.get_text() for figure in figures if figure for text in texts_of(figure)]
    assert not unseen("".join(texts)) and any("\\x1b]0;owned" in text for text in texts)


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_shows_names_as_codes(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    monkeypatch.setenv("TERM", "xterm")
    stream = Stream()
    phase = {"name": HOSTILE, "objective": "mlm", "first_step": 1, "steps": 2, "end_tokens": 4}
    with RunProgress([phase], 0, stream=stream) as progress:
        progress.show({"step": 1, "phase": HOSTILE, "tokens": 2, "spike": HOSTILE})
        progress.say(HOSTILE)
    written = stream.getvalue()
    assert "\x1b]0;" not in written and "\x07" not in written and "\u202e" not in written and "\\u202e" in written


def _finished() -> None:
    job = SimpleNamespace(cell=Cell(HOSTILE, HOSTILE, 0), cost=1.0)
    with SuiteProgress([job], {}, 1) as progress:
        progress.finished(job, {"metric": HOSTILE, "score": 0.5, "dev_score": 0.5, "seconds": 1.0})


def _windows() -> None:
    with CountProgress(1, "windows") as progress:
        progress.on(HOSTILE)
        progress.add(1)


def _figures() -> None:
    figure = {"value": 1.0, "low": None, "high": None}
    kind = {"words": 1, "unknown": 1, "perplexity": figure, "bits_per_byte": figure, "accuracy": figure}
    change = {"all": dict.fromkeys(("perplexity", "bits_per_byte", "accuracy"), figure)}
    line = {
        "model": HOSTILE,
        "corpus": HOSTILE,
        "compared_with": HOSTILE,
        "documents": 1,
        "windows": 1,
        "change": change,
    }
    print(tables.as_markdown([line | {"all": kind, "domain": None}]))
    tables.print_tables([line | {"all": kind, "domain": None}])


def _guesses() -> None:
    outcome = probes.Outcome(HOSTILE, (probes.Guess((HOSTILE, HOSTILE), False, 1),))
    probes.print_report(probes.Report((probes.Probe(HOSTILE, HOSTILE),), (outcome,)))


@pytest.mark.parametrize(
    "show",
    [
        _finished,
        _windows,
        _figures,
        _guesses,
        lambda: print(CheckResult(NOTE, "plan", HOSTILE, HOSTILE)),
        lambda: build_progress.say(HOSTILE),
    ],
    ids=["fine-tuning", "windows", "figures", "probes", "doctor", "build"],
)
def test_lines_of_commands_show_names_as_codes(show: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> None:
    show()
    shown = "".join(capsys.readouterr())
    assert not unseen(shown) and "\\x1b" in shown


def test_errors_show_names_as_codes(capfd: pytest.CaptureFixture[str]) -> None:
    errors.print_error(f"{HOSTILE}\udcff: is no corpus", 0)
    told = capfd.readouterr().err
    assert not unseen(told) and told.startswith("error: a\\x1b]0;owned")


def test_an_evaluations_plot_shows_names_as_codes() -> None:
    score = {"mean": 0.5, "sd": None, "seeds": 1, "interval": None}
    task = {"name": HOSTILE, "metric": "micro_f1", "scores": {HOSTILE: score}, "differences": {}}
    summary = {"models": [HOSTILE], "tasks": [task], "average": {"scores": {}, "tasks": []}, "against_baseline": []}
    figure = evaluation_plots.draw_scores(summary)
    shown = "".join(text.get_text() for text in texts_of(figure)) + evaluation_plots.describe(summary)
    assert not unseen(shown) and "\\x1b" in shown
