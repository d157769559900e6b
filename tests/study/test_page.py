"""The page of a study from made-up results: complete ones, and studies that are unfinished or went wrong."""

from __future__ import annotations

import csv
import io
import json
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest

from megatron_detour.errors import DetourError
from megatron_detour.evaluation.finetuning.protocol import FinetuneSettings
from megatron_detour.settings import settings_of
from megatron_detour.study.data import StudyData, decay_sweeps
from megatron_detour.study.page import write_page
from megatron_detour.study.page.analysis_tables import best_budget
from megatron_detour.study.page.methods import latex
from megatron_detour.study.page.tables import SETTINGS
from megatron_detour.study.statistics import compare
from tests.study.made_up import (
    ARMS,
    CRITERIA,
    DEPTH,
    FINETUNING,
    SEEDS,
    TASKS,
    analyses,
    make_study,
    registration,
    runs,
    scores,
    verdicts,
)

PLOTS = ["differences", "curves", "drift", "drift_ratio", "persistence", "decay_sweep", "transplants"]
HEADINGS = [
    "The arms", "Scores on tasks", "Differences from the control", "Validation loss", "Drift",
    "Drift beyond the noise of seeds", "Persistence", "Decay sweep", "Transplants", "Needle in a haystack",
    "Layer choice", "Everything that was run", "Data and settings", "Methods",
]  # fmt: skip


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Path:
    folder = make_study(tmp_path_factory.mktemp("study"))
    assert write_page(folder) == folder / "study.html"
    return folder


def words(page: Path) -> str:
    text = re.sub(r"<(style|svg).*?</\1>", " ", page.read_text(), flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", text)).split())


def rows(folder: Path, plot: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((folder / "study" / f"{plot}.csv").read_text())))


def table(folder: Path, heading: str) -> dict[str, list[str]]:
    """The first table of a section of study.md, by its first column."""
    section = (folder / "study.md").read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return {line[0].strip("*"): line[1:] for line in lines}


def headings(folder: Path) -> list[str]:
    return re.findall(r"^## (.*)$", (folder / "study.md").read_text(), re.MULTILINE)


def is_score(line):
    return line["kind"] == "score"


# ------------------------------------------------------------------------------------------------ a complete study


def test_all_files_of_a_complete_study(complete):
    named = {f"{plot}.{kind}" for plot in PLOTS for kind in ("png", "svg", "csv")} | {"methods.txt", "table.tex"}
    assert {path.name for path in (complete / "study").iterdir()} == named
    assert headings(complete) == HEADINGS
    html, text = (complete / "study.html").read_text(), (complete / "study.md").read_text()
    assert re.findall(r"<h2>(.*?)</h2>", html) == [*HEADINGS, "Versions"]
    assert len(re.findall(r"<svg viewBox=.*?<desc>", html)) == len(PLOTS)
    assert not re.search(r"(src|href)=\"(?!#)|<script|<link|url\((?!#)|@import|https?://", html)
    linked = re.findall(r"\]\((.*?)\)", text)
    assert len(linked) == 3 * len(PLOTS) and all((complete / name).stat().st_size for name in linked)


def test_the_page_is_a_pure_function_of_two_files(complete, tmp_path):
    page = write_page(complete, tmp_path / "docs")
    assert page == tmp_path / "docs" / "study.html"
    written = [path for path in page.parent.rglob("*") if path.is_file()]
    assert len(written) == 3 * len(PLOTS) + 4
    for path in written:
        assert path.read_bytes() == (complete / path.relative_to(page.parent)).read_bytes(), path.name


def test_verdicts_come_first(complete):
    for text in (words(complete / "study.html"), (complete / "study.md").read_text().replace("\\", "")):
        places = [text.index(mark) for mark in (
            "4 criteria: 2 met, 1 not met, 1 not judged.", "detour helps", "low layers are needed", "drift is early",
            "mid layers are not", "Registered 2026-11-29 04:30:00 UTC", "Not changed since.",
            "21 of 21 pretraining runs",
            "What the study could find: A difference of 0.90 points", "The arms",
        )]  # fmt: skip
        assert places == sorted(places)
        assert "p = 0.008 after Holm" in text and CRITERIA["drift is early"] in text
    states = re.findall(r'<span class="state ([a-z]*)">(.*?)</span>', (complete / "study.html").read_text())
    assert states == [("", "Met"), ("failed", "Not met"), ("", "Met"), ("open", "Not judged")]


def test_scores_with_both_kinds_of_luck(complete):
    lines, shown = scores(), table(complete, "Scores on tasks")
    assert next(iter(shown)) == "Arm" and list(shown)[2:] == ["start model", *ARMS]
    for arm in ARMS:
        for number, task in enumerate(TASKS):
            cells = np.array([line["score"] for line in lines if (line["arm"], line["task"]) == (arm, task)])
            cells = 100 * cells.reshape(len(SEEDS), len(FINETUNING))
            training, finetuning = cells.mean(1).std(ddof=1), cells.var(axis=1, ddof=1).mean() ** 0.5
            assert shown[arm][number + 1].strip("*") == f"{cells.mean():.1f} ({training:.1f} / {finetuning:.1f})"
        own = [100 * line["score"] for line in lines if line["arm"] == arm]
        assert shown[arm][0].strip("*").startswith(f"{np.mean(own):.1f} (")
    assert re.fullmatch(r"\d\d\.\d \(– / \d\.\d\)", shown["start model"][0])


def test_differences_are_those_of_the_statistics(complete):
    data = StudyData.read(complete)
    assert data.control == "control"
    drawn = {row["arm"]: row for row in rows(complete, "differences") if row["task"] == "mean"}
    assert list(drawn) == [arm for arm in ARMS if arm != "control"]
    for arm, row in drawn.items():
        expected = compare(data.scores(arm), data.scores("control"))
        found = [float(row[key]) for key in ("difference_points", "low", "high")]
        assert found == pytest.approx([100 * x for x in (expected.mean, expected.low, expected.high)])
    cell = table(complete, "Differences from the control")["detour"][0]
    low, high = (f"{float(drawn['detour'][key]):+.1f}" for key in ("low", "high"))
    assert cell == f"**{float(drawn['detour']['difference_points']):+.1f} ({low} to {high})**"
    assert table(complete, "Differences from the control")["start model"][1] == "–"  # no test without training seeds


def test_losses_and_curves(complete):
    final = {(line["arm"], line["seed"]): line["loss"] for line in runs()}
    own = [final["detour", seed] for seed in SEEDS]
    shown = table(complete, "Validation loss")
    assert shown["detour"][0] == f"{np.mean(own):.4f} ± {np.std(own, ddof=1):.4f}"
    change = np.mean([final["detour", seed] - final["control", seed] for seed in SEEDS])
    assert shown["detour"][3] == f"{change:+.4f}".replace("-", "−") and shown["control"][3] == "–"
    last = {(row["arm"], int(row["seed"])): float(row["mlm_loss"]) for row in rows(complete, "curves")}
    assert last == pytest.approx(final)


def test_drift_persistence_and_transplants(complete):
    drifts = [line for line in analyses() if line["kind"] == "drift" and line["arm"] == "detour"]
    ratios = [np.mean(line["divergence"], 0)[:3].mean() / np.mean(line["noise"], 0)[:3].mean() for line in drifts]
    section = (complete / "study.md").read_text().split("## Drift\n")[1]
    low = next(line for line in section.splitlines() if line.startswith("| detour | low (0-2)"))
    assert low.split(" | ")[4] == f"{np.exp(np.mean(np.log(ratios))):.2f}"
    drawn = rows(complete, "drift_ratio")
    assert len(drawn) == 2 * len(SEEDS) * DEPTH
    first = np.mean(drifts[0]["divergence"], 0) / np.mean(drifts[0]["noise"], 0)
    assert [float(row["ratio"]) for row in drawn[:DEPTH]] == pytest.approx(first.tolist())
    assert {row["region"] for row in rows(complete, "persistence")} == {"low", "mid", "deep", "all"}
    given = {(x["parts"], x["seed"]): x["score"] for x in analyses() if x["kind"] == "transplant"}
    ends = {part: np.mean([given[part, seed] for seed in SEEDS]) for part in ("none", "mlp", "all")}
    share = 100 * (ends["mlp"] - ends["none"]) / (ends["all"] - ends["none"])
    by_score, by_loss = (line for line in (complete / "study.md").read_text().splitlines() if line.startswith("| mlp"))
    assert f" | {share:+.0f}% | 3 |" in by_score and by_loss == "| mlp | 1.8000 ± 0.0000 | +67% | 3 |"
    drawn = {measure: {(row["parts"], int(row["seed"])): float(row["percent_or_nats"])
                       for row in rows(complete, "transplants") if row["measure"] == measure}
             for measure in ("hoc", "loss")}  # fmt: skip
    assert drawn["hoc"] == pytest.approx({key: 100 * score for key, score in given.items()})
    assert drawn["loss"]["low", 17] == pytest.approx(5 * 0.39)


def test_transplants_of_earlier_versions_have_no_loss(tmp_path):
    lines = [{key: value for key, value in line.items() if key != "loss"} for line in analyses()]
    folder = make_study(tmp_path, [line for line in lines if line["kind"] == "transplant"])
    write_page(folder)
    assert {row["measure"] for row in rows(folder, "transplants")} == {"hoc"}


def test_settings_are_in_words(complete):
    section = (complete / "study.md").read_text().split("**Fine-tuning settings**")[1]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    assert rows[0] == ["Setting", "ncbi_disease, chemprot, pubmedqa", "hoc"]
    assert rows[2:] == [["learning rate", "5e-05", "5e-05"], ["passes over the training examples", "10", "20"]]


def test_every_setting_of_fine_tuning_has_words():
    names = {setting.name for setting in settings_of(FinetuneSettings)}
    assert SETTINGS.keys() <= names
    assert {name for name in names if "_" in name} - SETTINGS.keys() == {"learning_rate", "weight_decay"}


def test_needles_and_layers(complete):
    shown = table(complete, "Needle in a haystack")
    assert shown["Arm"][2:7] == ["512 tokens", "1,024 tokens", "at the start", "at the middle", "at the end"]
    assert shown["detour"] == ["62.0", "+12.0", "64.0", "60.0", "62.0", "62.0", "62.0", "3"]
    assert shown["control"][1] == "–" and shown["control_b"][:2] == ["51.0 (48.5 to 53.5)", "+1.0"]
    text = (complete / "study.md").read_text().replace("\\", "")
    assert "answers 225 questions, which alone moves its accuracy by up to ±6.5 points" in text
    shown = table(complete, "Layer choice")
    assert list(shown)[2:] == ["17", "18", "19", "all, by geometric means"]
    ratio = drift_ratio(analyses())
    needed = np.flatnonzero(ratio > 2)
    assert shown["all, by geometric means"] == [
        f"{needed[0]}-{needed[-1]}", f"{ratio[needed].min():.2f} to {ratio[needed].max():.2f}",
        f"layers.{needed[-1] + 1}-{DEPTH - 1}",
    ]  # fmt: skip
    arm = f"proposed: {{set: {{phases.detour.freeze: [layers.{needed[-1] + 1}-{DEPTH - 1}]}}}}"
    assert f"As an arm of a further study: {arm}" in text


def drift_ratio(lines):
    """The geometric mean over seeds of the detour's ratios, [layers]."""
    found = [line for line in lines if line["kind"] == "drift" and line["arm"] == "detour"]
    ratios = [np.mean(line["divergence"], 0) / np.mean(line["noise"], 0) for line in found]
    return np.exp(np.mean(np.log(ratios), 0))


def test_methods_and_latex(complete):
    methods = (complete / "study" / "methods.txt").read_text()
    for fact in ("8 layers with 20.3M parameters", "7 arms", "3 training seeds each (17, 18, 19)", "21 of 21 runs",
                 "7 arms (detour, control, control_b,", "5e0c7a000000…)",
                 "the start model and 7 arms were fine-tuned",
                 "4 tasks: ncbi_disease (entity F1)", f"{len(scores())} fine-tunings",
                 "500 held-out texts in 3 draws", "4 criteria were registered on 2026-11-29", "Holm"):  # fmt: skip
        assert fact in methods, fact
    body = (complete / "study" / "table.tex").read_text()
    lines = [line for line in body.splitlines() if line.endswith(r" \\")]
    assert len(lines) == 2 + len(ARMS) and {line.count(" & ") for line in lines} == {1 + len(TASKS)}
    assert r"low\_frozen & " in body and r"\toprule" in body and body.count("{") == body.count("}")


# ------------------------------------------------------------------------------------------------ partial studies


def test_nothing_has_run_yet(tmp_path):
    folder = make_study(tmp_path, lines=[])
    (folder / "results.jsonl").unlink()
    text = words(write_page(folder))
    assert "4 criteria: 4 not judged." in text and "0 of 21 pretraining runs have finished." in text
    assert text.count("There is no verdict yet.") == 4
    assert headings(folder) == ["The arms", "Everything that was run", "Data and settings", "Methods"]
    assert [path.name for path in (folder / "study").iterdir()] == ["methods.txt"]


def test_without_evaluation_and_earlier_files_are_removed(tmp_path):
    write_page(make_study(tmp_path))
    folder = make_study(tmp_path, keep=lambda line: line["kind"] in ("run", "drift"))
    write_page(folder)
    absent = {"Scores on tasks", "Differences from the control", "Persistence", "Transplants", "Needle in a haystack"}
    assert headings(folder) == [heading for heading in HEADINGS if heading not in absent]
    left = {path.stem for path in (folder / "study").iterdir()}
    assert left == {"curves", "drift", "drift_ratio", "decay_sweep", "methods"}
    assert "fine-tuned" not in (folder / "study" / "methods.txt").read_text()
    assert "Best final loss: decay_30 (2.4M tokens)" in (folder / "study.md").read_text()


def test_a_failed_arm_is_told(tmp_path):
    failure = {"kind": "failure", "job": "train/mid_frozen/18", "status": "failed", "message": "the loss is NaN"}
    skipped = {"kind": "failure", "job": "score/mid_frozen/18/hoc", "status": "skipped", "message": "needs a run"}
    lines = [line for line in [*runs(), *scores()] if (line["arm"], line["seed"]) != ("mid_frozen", 18)]
    folder = make_study(tmp_path, [*lines, failure, skipped])
    text = words(write_page(folder))
    assert "20 of 21 pretraining runs have finished; 2 jobs failed or were skipped." in text
    assert "Not finished: mid_frozen seed 18." in text and "train/mid_frozen/18 failed the loss is NaN" in text
    assert "Everything that failed" in headings(folder)
    assert "The mean is over fewer training seeds than others: mid_frozen (2)." in text
    data = StudyData.read(folder)
    assert data.difference("mid_frozen").training_seeds == 2 and data.difference("detour").training_seeds == 3


def test_a_diverged_run_is_told(tmp_path):
    lines = runs()
    lines[0] |= {"loss": None, "status": "failed", "tokens": 8_000_000, "curve": [[0, 2.6], [8_000_000, None]]}
    folder = make_study(tmp_path, lines)
    text = words(write_page(folder))
    assert "Without a final loss: detour seed 17." in text and "20 of 21 pretraining runs have finished." in text
    assert "Not finished: detour seed 17." in text and "20.3M – failed" in text
    assert rows(folder, "curves")[1] == {"arm": "detour", "seed": "17", "tokens": "8000000.0", "mlm_loss": ""}


@pytest.mark.filterwarnings("error")
def test_one_training_seed_and_one_finetuning_seed(tmp_path):
    def keep(line):
        return line.get("seed") in (None, 17) and line.get("finetuning_seed") in (None, 42)

    study = registration()["study"] | {"seeds": [17]}
    folder = make_study(tmp_path, keep=keep, study=study)
    write_page(folder)
    assert set(rows(folder, "differences")[0].values()) >= {"detour", "mean", ""}  # no interval
    assert re.fullmatch(r"\d\d\.\d \(– / –\)", table(folder, "Scores on tasks")["detour"][0])
    assert table(folder, "Differences from the control")["detour"][1] == "–"
    assert "could be luck" in (folder / "study.md").read_text()
    assert "scriptsize" not in (folder / "study" / "table.tex").read_text()


def test_the_mean_is_over_tasks_that_all_arms_have(tmp_path):
    def keep(line):
        return not (is_score(line) and line["arm"] == "decay_3" and line["task"] == "hoc")

    folder = make_study(tmp_path, keep=keep)
    text = words(write_page(folder))
    assert "The mean leaves out hoc: not every arm has it." in text and "Mean of 3 tasks" in text
    assert table(folder, "Scores on tasks")["decay_3"][3] == "–"
    own = [100 * x["score"] for x in scores() if x["arm"] == "detour" and x["task"] != "hoc"]
    assert table(folder, "Scores on tasks")["detour"][0].startswith(f"{np.mean(own):.1f} (")


def test_drift_without_noise_has_no_ratio(tmp_path):
    lines = [line | {"noise": None} for line in analyses() if line["kind"] == "drift"]
    folder = make_study(tmp_path, lines)
    write_page(folder)
    assert "Drift" in headings(folder) and "Drift beyond the noise of seeds" not in headings(folder)
    assert {row["noise"] for row in rows(folder, "drift")} == {""}


# ------------------------------------------------------------------------------------------------ single parts


def test_amendments_stand_before_the_results(complete, tmp_path):
    change = "criteria.detour helps: was 'p < 0.05', is 'p < 0.2'"
    amended = [{"when": "2026-12-01T00:00:00Z", "reason": "the level was <too> strict", "changes": [change]}]
    folder = make_study(tmp_path, amendments=amended)
    html = write_page(folder).read_text()
    text = (folder / "study.md").read_text()
    for page in (words(folder / "study.html"), text.replace("\\", "")):
        assert page.index("Changed after the registration") < page.index("The arms")
        assert change in page and "the level was <too> strict" in page and "Not changed since" not in page
    assert '<div class="amended">' in html and "<too>" not in html
    assert "1 later amendment" in (folder / "study" / "methods.txt").read_text()
    assert '<div class="amended">' not in (complete / "study.html").read_text()


def test_other_versions_than_the_registered_are_told(complete, tmp_path):
    assert "other versions" not in (complete / "study.md").read_text()
    used = {"kind": "versions", "versions": {"torch": ["2.13.0", "2.14.0"], "deepspeed": ["0.18"]}}
    folder = make_study(tmp_path, [*runs(), used])
    html = words(write_page(folder))
    text = (folder / "study.md").read_text().replace("\\", "")
    for page in (html, text):
        assert "under other versions than were registered: torch 2.14.0 instead of 2.13.0." in page
        assert page.index("other versions") < page.index("The arms")
    assert "Versions: megatron_detour 1.0, torch 2.13.0 and 2.14.0, deepspeed 0.18." in text


def test_a_sweep_is_of_arms_that_differ_in_the_last_phase_only(complete):
    data = StudyData.read(complete)
    assert decay_sweeps(data) == [["decay_3", "detour", "decay_30"]]  # not control_b, which differs by its seeds


def test_the_best_budget_has_its_uncertainty(tmp_path):
    gains = {"detour": 5.0, "decay_30": 4.99, "decay_3": 1.0}
    noise = np.random.default_rng(3)
    lines = [
        line | {"score": 0.6 + gains[line["arm"]] / 100 + noise.normal(0, 0.001)}
        for line in scores()
        if line["arm"] in gains
    ]
    data = StudyData.read(make_study(tmp_path, lines))
    sentence = best_budget(data, decay_sweeps(data)[0])
    assert sentence.startswith("Best mean score: detour (800k tokens); the difference from decay_30 could be luck")
    lines = [line | {"score": line["score"] - 0.02 * (line["arm"] == "decay_30")} for line in lines]
    data = StudyData.read(make_study(tmp_path, lines))
    assert "every other budget is worse" in best_budget(data, decay_sweeps(data)[0])


def test_names_are_no_markup(tmp_path):
    lines = [line | {"task": "<b>a|b$x^"} if is_score(line) and line["task"] == "hoc" else line for line in scores()]
    folder = make_study(tmp_path, lines, name="50% of <i>$x$_y")
    html = write_page(folder).read_text()
    assert "<b>a|" not in html and "&lt;b&gt;a|b$x^" in html and "<i>" not in html
    assert r"\<b\>a\|b\$x^" in (folder / "study.md").read_text()
    tex = (folder / "study" / "table.tex").read_text()
    assert r"a|b\$x\textasciicircum{}" in tex and r"50\% of" in tex


def test_latex_is_literal():
    assert latex("a_b & 5% ~ ^ \\ {x} #1 $") == (
        r"a\_b \& 5\% \textasciitilde{} \textasciicircum{} \textbackslash{} \{x\} \#1 \$"
    )


def test_plots_follow_the_dark_mode_of_the_page(complete):
    html = (complete / "study.html").read_text()
    drawings = re.findall(r"<svg .*?</svg>", html, re.DOTALL)
    assert len(drawings) == len(PLOTS) and all("#" not in re.sub(r"url\(#|href=\"#|&#", "", d) for d in drawings)


# ------------------------------------------------------------------------------------------------ damaged files


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"kind": "run", "arm"', "line 2: not a result of a study: "),
        ('{"kind": "thread", "arm": "detour"}', "line 2: not a result of a study: Invalid value 'thread'"),
        ('{"kind": "score", "arm": "detour", "seed": 17}', "line 2: not a result of a study: Object missing required"),
        ('{"kind": "failure", "job": "x", "status": "odd", "message": ""}', "Invalid enum value 'odd'"),
        (json.dumps(analyses()[0] | {"divergence": [[0.1, 0.2], [0.1]]}), "draws of different numbers of layers"),
        (json.dumps(analyses()[0] | {"noise": [[0.1, 0.2]]}), "results of 2 layers, and the registered encoder has 8"),
        (json.dumps(scores()[50] | {"arm": "other"}), "results of 'other', which is not an arm of the registration"),
    ],
)
def test_a_damaged_result_is_refused_and_nothing_is_written(tmp_path, line, why):
    folder = make_study(tmp_path, verdicts()[:1])
    with (folder / "results.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DetourError, match=re.escape(why)):
        write_page(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["registration.json", "results.jsonl"]


def test_a_damaged_registration_is_refused(tmp_path):
    with pytest.raises(DetourError, match=r"registration.json: no such file; give the folder"):
        write_page(tmp_path)
    with pytest.raises(DetourError, match="format 2, and this version reads 1"):
        write_page(make_study(tmp_path, format=2))
    with pytest.raises(DetourError, match=r"not a registration: Expected `object`, got `array` - at `\$\.arms`"):
        write_page(make_study(tmp_path, arms=[]))
