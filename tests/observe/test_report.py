from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_detour.errors import DetourError
from megatron_detour.observe import compare, report
from megatron_detour.observe.report import write_report
from megatron_detour.observe.run_folder import read_run
from tests.observe.runs import ENVIRONMENT, TWO_PHASES, change_records, make_run
from tests.observe.shown import words, words_of

PNG = b"\x89PNG\r\n\x1a\n"
ALWAYS = {
    "loss.png",
    "gradient_norm.png",
    "learning_rate.png",
    "validation.png",
    "bits_per_byte.png",
    "throughput.png",
    "machine.png",
}


def plot_names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "plots").iterdir()}


def page_words(folder: Path) -> str:
    """The text of a run's page, for which no plot is drawn."""
    return words_of(report._page(read_run(folder), []))


def test_a_finished_run_of_three_phases(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    assert not (folder / "plots").exists()
    page = write_report(folder)
    assert page == folder / "report.html"
    assert plot_names(folder) == ALWAYS | {"schedule.png"}
    html, text = page.read_text(encoding="utf-8"), words(page)
    assert html.count("<svg ") == html.count("</desc>") == len(ALWAYS) + 1 and "<img" not in html
    assert all(path.read_bytes().startswith(PNG) for path in (folder / "plots").iterdir())
    assert "Finished : 300 steps" in text
    assert "Validation MLM loss (nats per token) 2.610 → 2.260 \u22120.350, step 0 to 300" in text
    assert "Validation MLM accuracy 51.2% → 57.2% +6.0 points" in text
    assert "Tokens trained 19.7M of 19.7M planned" in text
    assert "Training time 2m16s" in text  # 7.3 s + 299 times 0.43 s
    assert "Mean throughput 145k tokens per second" in text
    assert "Waiting for data 0.9%" in text
    assert "decay MLM 15% masked 60 3.93M 15.7M – 19.7M rises to 0.0005 over 655k tokens" in text
    assert "149,655,232" in text and "2026-03-02T18:40:51+00:00 (resumed) 100" in text
    assert "deepspeed 0.19.4" in text and "seed: 17" in text and "7.420 nats per token" in text
    assert "2.24 GiB" in text and "abababababab" in text and "cdcdcdcdcdcd" in text
    assert not list(folder.rglob("*.part"))


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    html = write_report(make_run(tmp_path)).read_text(encoding="utf-8")
    assert "<script" not in html and "<link" not in html
    assert not re.search(r"(src|href)=\"(?!#)", html)
    assert not re.search(r"url\((?!#)|@import|https?://", html)


def test_text_from_the_run_is_escaped(tmp_path: Path) -> None:
    phases = [("<i>one</i> $x^", "mlm", 0.3, 5), ("two & co", "clm", None, 5)]
    page = write_report(make_run(tmp_path, phases, name="<script>alert(1)</script>"))
    html = page.read_text(encoding="utf-8")
    for raw in ("<script>", "<i>one", "<b>0</b>"):
        assert raw not in html
    for escaped in ("&lt;script&gt;alert(1)", "&lt;i&gt;one&lt;/i&gt;", "web-&lt;b&gt;0", "two &amp; co"):
        assert escaped in html


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    text = page_words(make_run(tmp_path, TWO_PHASES, done=140))
    assert "Unfinished : step 140 of 200" in text and "Finished :" not in text
    assert "decay MLM 30% masked 20 of 80" in text
    assert "Tokens trained 9.18M of 13.1M planned" in text


def test_a_run_without_validation_has_no_such_plot(tmp_path: Path) -> None:
    folder = make_run(tmp_path, validate_every=0, environment={**ENVIRONMENT, "unigram_loss": None})
    (folder / "plots").mkdir()
    (folder / "plots" / "validation.png").write_bytes(b"stale")
    text = words(write_report(folder))
    assert plot_names(folder) == ALWAYS - {"validation.png", "bits_per_byte.png"} | {"schedule.png"}
    assert "This run has no validation figures." in text


@pytest.mark.parametrize("done", [1, 2])
def test_a_run_of_few_steps(tmp_path: Path, done: int) -> None:
    folder = make_run(tmp_path, [("only", "mlm", 0.3, 2)], done=done, validate_every=2)
    write_report(folder)
    assert plot_names(folder) == ALWAYS


def test_a_run_that_has_not_begun(tmp_path: Path) -> None:
    folder = make_run(tmp_path, done=0, validate_every=0)
    (folder / "metrics.jsonl").unlink()
    (folder / "environment.json").unlink()
    text = words(write_report(folder))
    assert "step 0 of 300" in text and "No step has been trained yet." in text


def test_a_single_validation_is_no_change(tmp_path: Path) -> None:
    text = page_words(make_run(tmp_path, done=10))
    assert "Validation MLM loss (nats per token) 2.610 at step 0, its only validation" in text


def test_a_folder_that_is_no_run_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(DetourError, match="is this a run directory"):
        write_report(tmp_path)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(DetourError, match="invalid JSON"):
        write_report(tmp_path)


def test_a_report_names_the_steps_without_figures_and_how_many_files_it_leaves_out(tmp_path: Path) -> None:
    corpora = [ENVIRONMENT["corpora"][0] | {"source_files": 99_985}]
    sessions = [ENVIRONMENT["sessions"][0] | {"missing_steps": "3-5", "ended": "SIGTERM"}]
    folder = make_run(tmp_path, done=30, environment=ENVIRONMENT | {"corpora": corpora, "sessions": sessions})
    text = page_words(folder)
    assert "and 99,980 more" in text
    assert "SIGTERM; no figures of steps 3-5" in text


def test_a_step_written_twice_counts_once(tmp_path: Path) -> None:
    folder = make_run(tmp_path, done=3, validate_every=0)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 99.0}\n{"step": 4, "lo')
    assert read_run(folder).steps["loss"][-1] == 99.0
    assert read_run(folder).done_steps == 3


def test_settings_that_phases_share_or_do_not_have_are_left_out(tmp_path: Path) -> None:
    text = page_words(make_run(tmp_path))
    assert text.count("64 sequences of 1,024 tokens per step") == 1
    for absent in ("frozen", "optimizer", "reads", "whole words", "Guards"):
        assert absent not in text, absent


def test_settings_of_a_phase_have_a_column(tmp_path: Path) -> None:
    corpora = [{"prefix": "data/web", "weight": 0.25}, {"prefix": "data/notes", "weight": 0.75}]
    warmup = {"from": 8, "increment": 8, "tokens": 2_000_000}
    phases = [
        ("detour", "clm", None, 30, {"freeze": ["embeddings", "layers.0-7"], "batch_warmup": warmup}),
        (
            "decay",
            "mlm",
            0.3,
            10,
            {"mask_rate_end": 0.1, "whole_word_masking": True, "optimizer_state": "reset", "corpora": corpora},
        ),
    ]
    text = page_words(make_run(tmp_path, phases))
    assert (
        "embeddings, layers 0-7 frozen; 8 to 64 sequences of 1,024 tokens per step, growing over 2M tokens; "
        "reads data/web (1)" in text
    )
    assert (
        "the optimizer state is reset; 64 sequences of 1,024 tokens per step; "
        "reads data/web (0.25), data/notes (0.75)" in text
    )
    assert "decay MLM 30% to 10% masked, whole words 10" in text


def test_tokens_are_those_of_the_records_where_steps_differ(tmp_path: Path) -> None:
    warmup = {"from": 1, "increment": 1, "tokens": 1}
    phases = [("one", "mlm", 0.3, 4, {"batch_warmup": warmup}), ("two", "mlm", 0.3, 4, {"sequences": 2})]
    folder = make_run(tmp_path, phases, done=6, validate_every=0)
    run = read_run(folder)
    assert [run.tokens_at(step) // 1024 for step in range(9)] == [0, 1, 3, 6, 10, 12, 14, 16, 18]
    assert run.done_tokens == 14 * 1024 and run.plan["total_tokens"] == 18 * 1024
    change_records(folder, {6: {"tokens": 999}})
    assert read_run(folder).done_tokens == 999
    assert "Tokens trained 14.3k of 18.4k planned" in page_words(make_run(tmp_path, phases, done=6))


def test_sessions_say_how_they_ended(tmp_path: Path) -> None:
    ends = ["the time limit of 23h00m", None, "error: out of memory", None]
    sessions = [{**ENVIRONMENT["sessions"][0], "step": 10 * i, "ended": end} for i, end in enumerate(ends)]
    environment = {**ENVIRONMENT, "sessions": sessions}
    text = page_words(make_run(tmp_path, done=40, environment=environment))
    for row in (
        "0 the time limit of 23h00m 4",
        "(resumed) 10 killed 4",
        "(resumed) 20 error: out of memory 4",
        "(resumed) 30 running, or killed 4",
    ):
        assert row in text, row


def test_guards_are_listed_up_to_twenty(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    changes = {step: {"skipped": "the loss is <nan>", "loss": None, "grad_norm": None} for step in range(101, 125)}
    change_records(folder, {99: {"spike": "spike: loss 7.10 is 8.2 sigma above"}, **changes})
    text = page_words(folder)
    assert "24 updates skipped, 1 spike reported; the first 20 of 25." in text
    assert "99 6.49M detour made spike: loss 7.10 is 8.2 sigma above" in text
    assert "119 7.8M detour skipped the loss is &lt;nan&gt;" in text and "120 7.86M" not in text


def test_figures_by_phase_and_corpus(tmp_path: Path) -> None:
    folder = make_run(tmp_path, TWO_PHASES, done=130, validate_every=65)
    corpora = {"val_mlm_loss/notes": 2.125, "val_mlm_accuracy/notes": 0.4321}
    change_records(folder, {0: corpora, 120: corpora})
    text = page_words(folder)
    assert "Figure before after detour at step 130" in text
    assert "MLM loss 2.610 2.900 2.382 MLM loss, notes 2.125 2.125 –" in text
    assert "MLM accuracy, notes 43.2% 43.2% –" in text
    assert "MLM bits per byte 0.870 0.967 0.794" in text


def test_a_plan_that_is_none_is_a_fault(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    for content, fault in (("[]", "Expected `object`, got `array`"), ("{}", "missing required field")):
        (folder / "plan.json").write_text(content)
        with pytest.raises(DetourError, match=fault):
            write_report(folder)


def test_of_many_sources_the_first_few_and_their_count_are_told(tmp_path: Path) -> None:
    sources = [{"path": f"part-{number:06}.jsonl", "bytes": 1024} for number in range(100_000)]
    corpus = ENVIRONMENT["corpora"][0] | {"sources": sources}
    folder = make_run(tmp_path, done=1, environment={**ENVIRONMENT, "corpora": [corpus]})
    html = report._page(read_run(folder), [])
    assert "part-000004.jsonl" in html and "part-000005" not in html
    assert "and 99,995 more, 97.7 MiB in all" in html and len(html) < 100_000


def test_descriptions_of_plots_tell_their_figures(tmp_path: Path) -> None:
    html = write_report(make_run(tmp_path)).read_text(encoding="utf-8")
    described = dict(re.findall(r"<title>([^<]+)</title><desc>([^<]+)</desc>", html))
    assert "MLM loss, held-out text: from 2.61 to 2.26, between 2.26 and 3.017" in described["Validation"]
    assert "MLM accuracy. accuracy: from 51.2% to 57.2%" in described["Validation"]
    assert all(re.search(r"\d", told) for told in described.values()) and len(described) == len(ALWAYS) + 1


def test_the_terminal_shows_the_figures_in_eighty_columns(tmp_path: Path) -> None:
    folder = make_run(tmp_path, [(f"phase-{n}", "mlm", 0.3, 9) for n in range(9)], name="a\x1b[31mb", validate_every=9)
    change_records(folder, {9: {f"val_mlm_loss/{'long corpus ' * 9}": 2.0}})
    text = report.as_text(folder)
    assert max(map(len, text.splitlines())) <= 80 and "\x1b" not in text
    assert text.startswith("a\\x1b[31mb: finished, 81 of 81 steps") and text.count("MLM accuracy") > 1
    assert "phase-8" in text and "Tokens trained" in text


WRONG = [
    None,
    True,
    -1,
    1.5,
    10**400,
    float("nan"),
    float("inf"),
    "x",
    "",
    [],
    [1],
    {},
    {"a": [None]},
    [[]],
    [{}],
    [None],
]


def places(content: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value, by its keys and numbers."""
    yield way
    children = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else []
    for key, value in children:
        yield from places(value, (*way, key))


def with_other(content: Any, way: tuple[Any, ...], value: Any) -> Any:
    if not way:
        return value
    copy = content.copy()
    copy[way[0]] = with_other(content[way[0]], way[1:], value)
    return copy


@pytest.mark.parametrize("name", ["plan.json", "environment.json"])
def test_a_value_of_any_type_at_any_place_is_shown_or_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path, TWO_PHASES, done=2, validate_every=1)
    monkeypatch.setattr(report, "PLOTS", [])
    whole = json.loads((folder / name).read_text())
    refused = 0
    for way in places(whole):
        for value in WRONG:
            (folder / name).write_text(json.dumps(with_other(whole, way, value)))
            try:
                write_report(folder)
                report.as_text(folder)
                compare._page([read_run(folder)] * 2, ["a", "b"], [{}, {}], [])
            except DetourError as fault:
                refused += 1
                assert name in str(fault) and "\n" not in str(fault)
    assert refused > 100


@pytest.mark.parametrize("content", ["", "nul", "[" * 100_000, '{"a": 1, "a": 2}', "\udcff"])
@pytest.mark.parametrize("name", ["plan.json", "environment.json"])
def test_a_file_that_is_no_json_is_refused(name: str, content: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path, done=1)
    (folder / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DetourError, match=name):
        write_report(folder)
