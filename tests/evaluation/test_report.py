"""Reports of made-up evaluations: the figures, what is refused, what is missing, what the reader sees."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from megatron_detour.errors import DetourError
from megatron_detour.evaluation.report.page import as_text, model_table, read_summary, write_report
from megatron_detour.evaluation.report.plots import draw_scores
from megatron_detour.evaluation.report.random_baseline import random_baseline
from megatron_detour.evaluation.report.summary import summarize
from megatron_detour.evaluation.report.tables import against_table, p_words, points, scores_table, tables
from megatron_detour.evaluation.task_types import METRICS as KNOWN_METRICS
from megatron_detour.ui.colors import PAGE
from tests.evaluation.evaluations import METRICS, MadeUp, make_evaluation
from tests.observe.shown import refuse_overlaps, texts_of, words

KINDS = [MadeUp(kind, kind, 40) for kind in METRICS]
NER, CLASSES = MadeUp("bc5cdr", "token-classification", 150), MadeUp("rct_sections", "classification", 150)
SKILLS = {"base": 0.5, "detour": 0.8}
FEW = 200  # permutations


@pytest.fixture
def two_models(tmp_path: Path) -> Path:
    return make_evaluation(tmp_path / "out", [NER, CLASSES], SKILLS)


def lines_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


def rewrite(output: Path, lines: list[dict[str, Any]]) -> None:
    (output / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def shown(table: Any) -> list[list[str]]:
    return [[f"*{entry.text}*" if entry.bold else entry.text for entry in row] for row in table.rows]


def task(summary: dict[str, Any], name: str) -> dict[str, Any]:
    return next(task for task in summary["tasks"] if task["name"] == name)


# ------------------------------------------------------------------------------------------------ the files


def test_a_report_of_every_kind_of_task(tmp_path):
    output = make_evaluation(tmp_path, KINDS, SKILLS)
    page = write_report(output, None, FEW)
    assert page == output / "report.html"
    assert {path.name for path in output.iterdir()} == {
        "report.html", "report.md", "scores.png", "summary.json", "results.jsonl", "predictions",
    }  # fmt: skip
    html, text, markdown = page.read_text(), words(page), (output / "report.md").read_text()
    (described,) = re.findall(r"<svg .*?<desc>(Scores: .*?)</desc>", html)
    assert "%" in described and "Differences from" in described and (output / "scores.png").stat().st_size
    assert not re.search(r"(src|href)=\"(?!#)|<script|<link|url\((?!#)|@import|https?://", html)
    assert "6 tasks, seeds 42, 43, 44, protocol quick." in text and read_summary(output)["verdict"] in text
    assert "6 comparisons by task (1 model compared with base)" in text and "6 comparisons by task" in markdown
    assert "![Scores by task, and differences from the baseline](scores.png)" in markdown
    summary = read_summary(output)
    assert summary == json.loads(json.dumps(summarize(output, None, FEW)))  # the same again
    for kind in METRICS:
        found = task(summary, kind)
        assert found["metric"] == METRICS[kind] and 0 < found["differences"]["detour"]["p"] < 0.2, kind
        scores = [line["score"] for line in lines_of(output) if (line["model"], line["task"]) == ("detour", kind)]
        assert found["scores"]["detour"]["mean"] == pytest.approx(np.mean(scores))
        assert found["scores"]["detour"]["sd"] == pytest.approx(np.std(scores, ddof=1))


def test_the_tables_in_words(tmp_path):
    output = make_evaluation(tmp_path, [NER, CLASSES], SKILLS)
    lines = lines_of(output)
    for line in lines:
        lead = 0.125 + 0.001 * (line["seed"] - 43)
        line["score"] = 0.5 + 0.01 * (line["seed"] - 43) + (line["model"] == "detour") * lead
    rewrite(output, lines)
    summary = summarize(output, None, FEW)
    assert shown(scores_table(summary)) == [
        ["bc5cdr", "entity F1", "50.0 ± 1.0", "*62.5 ± 1.1*"],
        ["rct_sections", "macro F1", "50.0 ± 1.0", "*62.5 ± 1.1*"],
        ["Mean of 2 tasks", "", "50.0 ± 1.0", "62.5 ± 1.1"],
    ]
    # tasks that differ by exactly as much say nothing of how tasks vary
    row = ["detour", "+12.5", "+12.4 to +12.6", "0.0002", "–", "1.00", "2 / 0 / 0", "2 / 0"]
    assert shown(against_table(summary)) == [row]
    by_task = next(table for table in tables(summary) if "by task" in table.title)
    # 1 of 201 permutations; the least of two by Holm's correction, and doubled as the mean over tasks is looked at too
    assert shown(by_task)[0] == ["bc5cdr", "*+12.5*", "+12.3 to +12.7", "<0.0001", "0.005", "0.020", "better"]
    cost = next(table for table in tables(summary) if table.title == "Cost")
    assert shown(cost)[0] == ["base", "6", "1m15s", "12s", "–"]
    assert any("on cpu (2 threads)" in remark for remark in cost.remarks)
    assert "BioCreative V CDR: chemicals and diseases in abstracts" in str(tables(summary))


def test_figures_as_they_are_read():
    assert [points(share) for share in (0.0123, -0.0123, 0.0001, -0.0001)] == ["+1.2", "−1.2", "0.0", "0.0"]
    assert [p_words(p) for p in (1e-5, 0.0001, 0.0123, 0.456, 1.0, None)] == [
        "<0.0001",
        "0.0001",
        "0.012",
        "0.46",
        "1.00",
        "–",
    ]


def test_bold_needs_a_clear_lead_over_every_other_model(tmp_path):
    skills = {"a": 0.4, "b": 0.9, "c": 0.9}
    output = make_evaluation(tmp_path, [CLASSES, NER], skills, luck=0.0)
    summary = summarize(output, None, FEW)
    assert all(difference["clear"] for t in summary["tasks"] for difference in t["differences"].values())
    assert not any("*" in text for row in shown(scores_table(summary)) for text in row)
    lone = make_evaluation(tmp_path / "lone", [CLASSES, NER], {"a": 0.4, "b": 0.9, "c": 0.6})
    assert all(row[3].startswith("*") for row in shown(scores_table(summarize(lone, None, FEW)))[:2])
    # the baseline may be the best one too
    assert all(row[2].startswith("*") for row in shown(scores_table(summarize(lone, "b", FEW)))[:2])


def test_one_seed_shows_no_clear_difference(tmp_path):
    output = make_evaluation(tmp_path, [NER, CLASSES], SKILLS, seeds=[42])
    summary = summarize(output, None, FEW)
    assert all(
        t["differences"]["detour"]["p"] < 0.05 and not t["differences"]["detour"]["clear"] for t in summary["tasks"]
    )
    assert any(note.startswith("with one seed the variance") for note in summary["notes"])
    assert shown(scores_table(summary))[0][2].count("±") == 0


def test_the_baseline_can_be_chosen(two_models):
    forth, back = summarize(two_models, None, FEW), summarize(two_models, "detour", FEW)
    assert (forth["baseline"], back["baseline"]) == ("base", "detour")
    assert back["against_baseline"][0]["cells"]["mean"] == -forth["against_baseline"][0]["cells"]["mean"] < 0
    assert back["against_baseline"][0]["tally"]["losses"] == 2
    for name in ("bc5cdr", "rct_sections"):
        there, here = (task(s, name)["differences"] for s in (forth, back))
        assert here["base"]["p"] == there["detour"]["p"] and here["base"]["mean"] == -there["detour"]["mean"]
        assert here["base"]["interval"] == pytest.approx([-end for end in reversed(there["detour"]["interval"])])
    with pytest.raises(
        DetourError, match=r"--baseline detours: not in \S+ \(did you mean 'detour'\?\); choose from base, detour"
    ):
        summarize(two_models, "detours", FEW)


def test_a_single_model_has_scores_and_no_comparison(tmp_path):
    output = make_evaluation(tmp_path, [NER], {"only": 0.7})
    text = words(write_report(output, None, FEW))
    assert (
        "Evaluation of 1 model" in text
        and "a comparison needs a second model. 1 task" in text
        and "Against" not in text
    )
    assert read_summary(output)["comparisons"] == 0


# ------------------------------------------------------------------------------------------------ the verdict


def fixed(output: Path, tasks: int, seeds: int, differences: list[float], models: int = 1) -> dict[str, Any]:
    """The summary of made-up scores: base has 0.5, the others are better by a task's difference and by seeds' luck."""
    names = [f"task{n}" for n in range(tasks)]
    skills = {"base": 0.5} | {f"other{n}": 0.5 for n in range(models)}
    make_evaluation(output, [MadeUp(name, examples=20) for name in names], skills, range(seeds))
    rewrite(
        output,
        [
            line
            | {
                "score": 0.5
                + (line["model"] != "base") * (differences[names.index(line["task"])] + 0.01 * line["seed"])
            }
            for line in lines_of(output)
        ],
    )
    return summarize(output, None, FEW)


def test_the_first_line_says_what_could_have_been_shown(tmp_path):
    summary = fixed(tmp_path, 2, 2, [0.01, 0.015])
    # half of Student's interval of 97.5% of task means 1.5 and 2.0: 25.452 * 0.354 / sqrt(2)
    assert summary["verdict"] == "No difference is clear: 2 tasks x 2 seeds cannot detect less than 6.4 points."
    write_report(tmp_path, None, FEW)
    assert (tmp_path / "report.md").read_text().startswith(f"# Evaluation\n\n**{summary['verdict']}**\n")
    several = fixed(tmp_path / "several", 2, 2, [0.01, 0.015], models=2)
    assert several["verdict"].endswith("cannot detect less than 12.7 points.")  # of two models, after Holm's correction
    assert fixed(tmp_path / "one", 1, 3, [0.01])["verdict"].endswith(
        "1 task x 3 seeds cannot detect less than 2.5 points."
    )
    assert fixed(tmp_path / "least", 1, 1, [0.01])["verdict"].endswith("1 task x 1 seed cannot detect any.")


def test_the_first_line_says_which_model_is_better(tmp_path):
    summary = fixed(tmp_path, 4, 2, [-0.03, -0.035, -0.04, -0.05])
    assert re.fullmatch(
        r"other0 is worse than base by 3\.4 points over 4 tasks \(95% −4\.7 to −2\.0, p 0\.00\d\)\.", summary["verdict"]
    )
    assert summary["against_baseline"][0]["by_tasks"]["clear"]


def test_a_mean_over_tasks_and_single_tasks_share_the_five_percent(tmp_path):
    """The first line speaks of both: with 5% for each it would find something in nothing twice as often."""
    lead = np.array([0.01, 0.02, 0.03, 0.045])
    both = fixed(tmp_path / "both", 4, 2, list(lead - 0.005))  # luck adds as much to the mean of two seeds
    tasks_alone = fixed(tmp_path / "tasks", 4, 1, list(lead))  # one seed: nothing is said of single tasks
    for summary, clear in ((both, False), (tasks_alone, True)):
        found = summary["against_baseline"][0]["by_tasks"]
        assert found["p"] == pytest.approx(0.039, abs=0.001) and found["clear"] == clear
        assert found["p_holm"] == pytest.approx(found["p"] * (1 if clear else 2))
        assert summary["verdict"].startswith("other0 is better than base by 2.6 points" if clear else "No difference")
        assert shown(against_table(summary))[0][1] == ("*+2.6*" if clear else "+2.6")
    assert both["against_baseline"][0]["least"] > found["mean"] and both["comparisons"] == 4
    assert "or a mean over tasks" in (written := str(tables(both))) and "doubled" in written
    assert "or a mean over tasks" not in (written := str(tables(tasks_alone))) and "doubled" not in written


def test_a_report_of_one_cell_or_of_equal_cells_is_written(tmp_path):
    for name, tasks, seeds in (("one", 1, 1), ("equal", 3, 1)):
        fixed(tmp_path / name, tasks, seeds, [0.01] * tasks)
        assert "by cells, p 1.00" in words(write_report(tmp_path / name, None, FEW))


def test_the_first_line_names_single_tasks(tmp_path):
    output = make_evaluation(tmp_path, [CLASSES], SKILLS, seeds=range(5), luck=0.001)
    verdict = summarize(output, None, 2000)["verdict"]
    assert verdict.startswith(
        "On single tasks: detour is better than base on rct_sections. Over all tasks no difference"
    )


# ------------------------------------------------------------------------------------------------ what is missing


def test_missing_cells_are_named_and_left_out_of_the_average(two_models):
    rewrite(two_models, [line for line in lines_of(two_models) if (line["task"], line["seed"], line["model"])
                         != ("bc5cdr", 44, "detour")])  # fmt: skip
    summary = summarize(two_models, None, FEW)
    assert summary["average"]["missing"] == ["detour, bc5cdr, seed 44"]
    assert summary["average"]["tasks"] == ["rct_sections"]
    assert "1 cell is missing (detour, bc5cdr, seed 44); the average excludes bc5cdr" in summary["notes"]
    rows = shown(scores_table(summary))
    assert rows[0][3].endswith(" (2)") and rows[-1][0] == "Mean of 1 task"
    assert summary["against_baseline"][0]["cells"]["units"] == 5
    assert task(summary, "bc5cdr")["differences"]["detour"]["seeds"] == 2


def test_a_model_without_a_task_in_common(two_models):
    rewrite(
        two_models, [line for line in lines_of(two_models) if (line["task"] == "bc5cdr") == (line["model"] == "base")]
    )
    summary = summarize(two_models, None, FEW)
    assert summary["average"]["tasks"] == [] and summary["against_baseline"][0]["cells"] is None
    assert against_table(summary).rows == [] and summary["comparisons"] == 0
    assert shown(scores_table(summary))[0][3] == "–"
    write_report(two_models, None, FEW)


def test_missing_predictions_leave_out_the_test(two_models):
    (two_models / "predictions/detour/bc5cdr/43.json").unlink()
    summary = summarize(two_models, None, FEW)
    found = task(summary, "bc5cdr")["differences"]["detour"]
    assert found["p"] is None and found["p_holm"] is None and not found["clear"]
    assert found["mean"] > 0 and found["interval"]
    assert task(summary, "rct_sections")["differences"]["detour"]["p"] < 0.05
    assert summary["comparisons"] == 1
    assert any(note.startswith("no permutation test on bc5cdr: predictions are missing") for note in summary["notes"])
    text = words(write_report(two_models, None, FEW))
    assert "no permutation test on bc5cdr" in text


def test_a_truncated_last_line_is_passed_over(two_models):
    whole = summarize(two_models, None, FEW)
    with (two_models / "results.jsonl").open("a") as file:
        file.write(json.dumps(lines_of(two_models)[0] | {"seed": 45})[:90])
    assert summarize(two_models, None, FEW) == whole


def test_the_latest_result_of_a_cell_counts(two_models):
    first = lines_of(two_models)[0]
    rewrite(two_models, [first | {"score": 0.0}, *lines_of(two_models)])
    assert task(summarize(two_models, None, FEW), first["task"])["scores"]["base"]["mean"] > 0.3


# ------------------------------------------------------------------------------------------------ what is refused


def test_no_results_at_all(tmp_path):
    with pytest.raises(DetourError, match="no results yet; evaluate a model first"):
        write_report(tmp_path, None)
    with pytest.raises(DetourError, match="write the report first"):
        read_summary(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"protocol": "paper-en"}, "protocols 'quick' and 'paper-en' are not comparable"),
        ({"metric": "accuracy"}, "task 'bc5cdr' are not comparable, they differ in metric"),
        ({"ner_head": "span"}, "differ in ner_head (tokens and span)"),
        ({"examples": {"train": 1, "dev": 1, "test": 1}}, "differ in examples ("),
        ({"identity": {"task": "other", "data": "d"}}, "differ in task definition (bc5cdr and other)"),
        ({"identity": {"task": "bc5cdr", "data": "e", "format": "1"}}, "differ in data (d and e)"),
        ({"score": float("nan")}, "the score nan of detour, bc5cdr, seed 44 is not a finite number"),
        ({"score": None}, "the score None of detour, bc5cdr, seed 44 is not a finite number"),
    ],
)
def test_results_that_do_not_compare_are_one_sentence(two_models, change, fault):
    *lines, last = sorted(lines_of(two_models), key=lambda line: (line["seed"], line["task"] == "bc5cdr"))
    rewrite(two_models, [*lines, last | change])
    with pytest.raises(DetourError) as raised:
        write_report(two_models, None, FEW)
    assert fault in str(raised.value) and "\n" not in str(raised.value)
    assert not (two_models / "report.md").exists()


def test_a_result_without_a_key_is_named(two_models):
    first, *others = lines_of(two_models)
    del first["seconds"]
    rewrite(two_models, [first, *others])
    with pytest.raises(DetourError, match=r"the result of base, bc5cdr, seed 42 lacks 'seconds'"):
        write_report(two_models, None)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("{", "invalid JSON"),
        ("[" * 100_000, "invalid JSON: nested too deeply"),
        ('{"labels": [], "labels": []}', "duplicate key 'labels'"),
        ("[]", "not a JSON object"),
        ('{"labels": [], "gold": [1]}', "not predictions of the form"),
        ('{"labels": [], "gold": [], "predicted": []}', "not predictions of the form"),
    ],
)
def test_damaged_predictions_are_named(two_models, content, fault):
    path = two_models / "predictions/detour/bc5cdr/43.json"
    path.write_text(content)
    with pytest.raises(DetourError, match=f"{path}: {fault}.*remove the file"):
        write_report(two_models, None)


@pytest.mark.parametrize("wrong", [None, [], {}, True, -1, 1e308, "", "x", [[]], [None], [{}], [[[]]], [True], [-5]])
@pytest.mark.parametrize("kind", METRICS)
def test_predictions_of_other_types_are_never_a_traceback(wrong, kind, tmp_path):
    output = make_evaluation(tmp_path, [MadeUp(kind, kind, 4)], SKILLS, seeds=[1, 2])
    path = tmp_path / f"predictions/detour/{kind}/2.json"
    content = json.loads(path.read_text())
    for key in content:
        for value in (wrong, [wrong] * 4, [[wrong]] * 4):
            path.write_text(json.dumps(content | {key: value}))
            # gold that all files share is read by chance too
            if key != "predicted":
                for other in tmp_path.glob("predictions/*/*/*.json"):
                    other.write_text(json.dumps(json.loads(other.read_text()) | {key: value}))
            try:
                summarize(output, None, 20)
            except DetourError as fault:
                assert "\n" not in str(fault) and str(tmp_path) in str(fault)
        make_evaluation(output, [MadeUp(kind, kind, 4)], SKILLS, seeds=[1, 2])


@pytest.mark.parametrize("content", ["[]", "null", "{", "[" * 100_000, '{"a": 1, "a": 2}', '{"format": 1}', "{}"])
def test_a_summary_of_another_kind_is_one_sentence(content, tmp_path):
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(DetourError, match=r"megatron-detour evaluate report /"):
        read_summary(tmp_path)


def test_a_task_of_one_s_own_keeps_its_title_and_language(tmp_path):
    own = MadeUp("ward", examples=20)
    output = make_evaluation(tmp_path, [own], SKILLS, title="Which ward a letter goes to", language="de")
    text = words(write_report(output, None, FEW))
    assert "ward Which ward a letter goes to de macro F1 20" in text
    assert {(row["title"], row["language"]) for row in model_table(output, "detour")} == {
        ("Which ward a letter goes to", "de")
    }
    make_evaluation(output, [own], SKILLS, title="a\u202eb\x1b[31m")
    assert model_table(output, "detour")[0]["title"] == r"'a\u202eb\x1b[31m'"


def test_predictions_on_other_data_are_refused(two_models):
    path = two_models / "predictions/detour/rct_sections/43.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"gold": content["gold"][::-1]}))
    with pytest.raises(DetourError, match="gold answers differ from the task's other predictions"):
        write_report(two_models, None)
    path.write_text(json.dumps(content | {"predicted": ["nothing"] * len(content["gold"])}))
    with pytest.raises(DetourError, match=f"{path}: prediction 'nothing' of example 0 is not a label.*remove the file"):
        write_report(two_models, None)


# ------------------------------------------------------------------------------------------------ sanity


def test_shuffled_labels_are_in_no_other_table(two_models):
    before = summarize(two_models, None, FEW)
    make_evaluation(two_models, [NER, CLASSES], {"detour": 0}, shuffled=True)
    after = summarize(two_models, None, FEW)
    assert shown(scores_table(after)) == shown(scores_table(before))
    assert [t["differences"] for t in after["tasks"]] == [t["differences"] for t in before["tasks"]]
    assert after["against_baseline"] == before["against_baseline"]
    found = task(after, "rct_sections")["sanity"]
    assert found["shuffled"]["detour"]["seeds"] == 3 and found["shuffled"]["detour"]["at_chance"]
    assert found["not_above"] == []
    sanity = next(table for table in tables(after) if table.title == "Sanity")
    assert sanity.headers == ["Task", "Random baseline (up to)", "detour, shuffled labels", "Not above random baseline"]
    assert after["cost"][1]["shuffled_runs"] == 6 and after["cost"][1]["runs"] == 6


def test_a_model_at_chance_and_a_shuffled_one_above_it_are_told(tmp_path):
    output = make_evaluation(tmp_path, [CLASSES], {"blind": 0.0, "good": 0.8}, luck=0.0)
    make_evaluation(output, [CLASSES], {"good": 0.0}, shuffled=True)
    for path in (output / "predictions/good/rct_sections").glob("*-shuffled.json"):
        assert json.loads(path.read_text())["labels"]
    rewrite(output, [line | {"score": 0.6} if line["shuffled"] else line for line in lines_of(output)])
    found = task(summarize(output, None, FEW), "rct_sections")["sanity"]
    assert found["not_above"] == ["blind"] and found["shuffled"]["good"]["at_chance"] is False
    text = words(write_report(output, None, FEW))
    assert "(3), above random baseline" in text


def test_a_model_with_shuffled_labels_only_takes_no_part_in_the_rest(two_models):
    before = summarize(two_models, None, FEW)
    make_evaluation(two_models, [NER], {"other": 0}, shuffled=True)
    after = summarize(two_models, "other", FEW)
    assert after["models"] == ["base", "detour"] and after["average"] == before["average"]
    assert task(after, "bc5cdr")["sanity"]["shuffled"].keys() == {"other"}
    assert [cost["model"] for cost in after["cost"]] == ["base", "detour", "other"]
    assert after["notes"] == before["notes"]


def test_an_evaluation_of_shuffled_labels_alone_has_a_report(tmp_path):
    output = make_evaluation(tmp_path, [NER], {"a": 0, "b": 0}, shuffled=True)
    text = words(write_report(output, None, FEW))
    assert "shuffled labels only" in text and "Sanity" in text and "Scores" not in text
    assert not (output / "scores.png").exists() and read_summary(output)["average"]["scores"] == {}
    with pytest.raises(DetourError, match="no finished task of 'a'"):
        model_table(output, "a")


def test_chance_by_hand():
    labels = ("no", "yes")
    common = random_baseline(KNOWN_METRICS["accuracy"], labels, ["yes"] * 70 + ["no"] * 30)
    assert common.score == pytest.approx(0.7) and 0.71 <= common.high < 0.85
    balanced = random_baseline(KNOWN_METRICS["macro_f1"], labels, ["yes", "no"] * 100)
    assert balanced.score == pytest.approx(0.5, abs=0.02)  # drawn; always "yes" would be 1/3
    several = random_baseline(KNOWN_METRICS["micro_f1"], labels, [["yes"], ["no"]] * 50)
    assert several.score == pytest.approx(2 / 3)  # both, always
    assert random_baseline(KNOWN_METRICS["pearson"], (), list(np.linspace(0, 4, 200))).score < 0.05
    assert random_baseline(KNOWN_METRICS["accuracy"], (), list(range(5)) * 40).score == pytest.approx(0.2, abs=0.01)
    rare = [["O"] * 9 + ["B-X"] if row % 2 else ["B-X"] + ["O"] * 9 for row in range(40)]
    assert random_baseline(KNOWN_METRICS["entity_f1"], ("O", "B-X", "I-X"), rare).score == pytest.approx(0.5, abs=0.1)


# ------------------------------------------------------------------------------------------------ what others use


def test_a_table_for_the_model_card(two_models):
    make_evaluation(two_models, [NER], {"detour": 0}, shuffled=True)
    rows = model_table(two_models, "detour")
    assert [row["task"] for row in rows] == ["bc5cdr", "rct_sections"]
    assert rows[0]["title"] == "BioCreative V CDR: chemicals and diseases in abstracts"
    scores = [line["score"] for line in lines_of(two_models)
              if (line["model"], line["task"], line["shuffled"]) == ("detour", "bc5cdr", False)]  # fmt: skip
    assert rows[0] == {
        "task": "bc5cdr",
        "title": rows[0]["title"],
        "language": "en",
        "metric": "entity_f1",
        "protocol": "quick",
        "mean": pytest.approx(np.mean(scores)),
        "sd": pytest.approx(np.std(scores, ddof=1)),
        "seeds": 3,
    }
    with pytest.raises(DetourError, match=r"has no model 'detor' \(did you mean 'detour'"):
        model_table(two_models, "detor")


def test_a_table_on_the_terminal(two_models):
    console = Console(file=io.StringIO(), width=150)
    as_text(json.loads(json.dumps(summarize(two_models, None, FEW))), console)
    text = console.file.getvalue()
    assert re.search(r"bc5cdr +entity F1 +\d\d\.\d ± \d", text) and "Compared with base" in text
    assert "2 comparisons by task (1 model compared with base)" in text and "Note: 3 seeds" in text


def test_too_few_permutations_are_told(tmp_path):
    output = make_evaluation(tmp_path, [MadeUp(f"task{n}", examples=20) for n in range(4)], SKILLS)
    notes = summarize(output, None, 50)["notes"]
    assert "50 permutations are too few for 4 comparisons to be significant" in notes


def test_names_are_no_markup(tmp_path):
    output = make_evaluation(tmp_path, [MadeUp("task_*_1", examples=20)], {"<b>a|b$x^": 0.5, "[red]c": 0.6})
    html = write_report(output, None, FEW).read_text()
    assert "<b>a|" not in html and "&lt;b&gt;a|b$x^" in html
    assert r"task\_\*\_1" in (output / "report.md").read_text() and r"a\|b" in (output / "report.md").read_text()
    console = Console(file=io.StringIO(), width=150)
    as_text(read_summary(output), console)
    assert "[red]c" in console.file.getvalue()


# ------------------------------------------------------------------------------------------------ the plot


def made_up_summary(tasks: int, models: list[str], seeds: int = 5) -> dict[str, Any]:
    """A summary that no results are behind, for drawing."""
    rng = np.random.default_rng(tasks)

    def score(mean: float) -> dict[str, Any]:
        half = abs(rng.normal(0, 0.01 if seeds > 2 else 0.3))
        return {
            "mean": mean,
            "interval": [mean - half, mean + half] if seeds > 1 else None,
            "clear": bool(rng.integers(2)),
        }

    rows = []
    for number in range(tasks):
        level = rng.uniform(0.2, 0.99)
        rows.append(
            {
                "name": f"task_of_some_length_{number}",
                "metric": "entity_f1",
                "scores": {model: score(level + rng.normal(0, 0.01)) for model in models},
                "differences": {model: score(rng.normal(0.01, 0.01)) for model in models[1:]},
            }
        )
    found = {"mean": 0.01, "low": -0.002, "high": 0.022, "p": 0.1, "clear": False}
    return {
        "models": models,
        "tasks": rows,
        "average": {"tasks": rows, "scores": {model: score(0.7) for model in models}},
        "against_baseline": [{"model": model, "cells": found, "by_tasks": found} for model in models[1:]],
    }


@pytest.mark.parametrize(
    ("tasks", "models", "seeds"),
    [
        (31, [f"a long model name $ of a hospital number {n}" for n in range(6)], 5),
        (4, ["a-very-long-name-of-a-modernbert-base-model-" * 3, "another-such-name-" * 6], 3),
        (3, ["base", "detour"], 2),
        (1, ["only"], 1),
    ],
)
def test_texts_do_not_overlap(tasks, models, seeds):
    figure = draw_scores(made_up_summary(tasks, models, seeds))
    refuse_overlaps(figure)
    shown = [text.get_text() for text in texts_of(figure)]
    assert "score on the test split (%)" in shown and sum("\nentity F1" in text for text in shown) == tasks
    assert any("(points)" in text for text in shown) == (len(models) > 1)


def test_the_plot_shows_the_figures():
    summary = made_up_summary(3, ["base", "detour"])
    summary["tasks"][1]["scores"]["detour"] = {"mean": 0.8, "interval": [0.78, 0.82]}
    summary["tasks"][1]["differences"]["detour"] = {"mean": -0.03, "interval": [-0.05, -0.01], "clear": True}
    scores, differences = draw_scores(summary).axes
    row = 2.2  # below the average and a task, in the lower half
    drawn = [(line.get_xdata(), line.get_ydata()) for axes in (scores, differences) for line in axes.lines]
    for x in ([80.0], [78.0, 82.0], [-3.0], [-5.0, -1.0]):
        assert any(np.allclose(x, xs) and np.allclose(ys, row) for xs, ys in drawn if len(xs) == len(x)), x
    marks = [line for line in differences.lines if line.get_marker() not in ("None", "")]
    filled = {round(float(line.get_ydata()[0])): line.get_markerfacecolor() != PAGE for line in marks}
    assert filled[2] is True and filled[0] is False
