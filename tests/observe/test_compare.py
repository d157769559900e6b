from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_detour.errors import DetourError
from megatron_detour.observe import compare, plots
from megatron_detour.observe.compare import write_comparison
from megatron_detour.observe.run_folder import read_run
from tests.observe.runs import ENVIRONMENT, TOKENS_PER_STEP, TWO_PHASES, change_records, five_phases, make_run
from tests.observe.shown import refuse_overlaps, words, words_of

CONTROL = [("detour", "mlm", 0.3, 120), ("decay", "mlm", 0.3, 80)]
DETOUR_FILE = """
seed: 17
data: {sequence_length: 1024}
validation: {sequences: 128, seed: 3, mask_rate: 0.3, every: 20}
phases: [{name: detour, objective: clm}, {name: decay, objective: mlm, mask_rate: 0.3}]
"""
CONTROL_FILE = DETOUR_FILE.replace("objective: clm", "objective: mlm, mask_rate: 0.3")
COMPARED = [plot for plot in plots.PLOTS if plot.compared]
PLOTS = {plot.file for plot in COMPARED}


@pytest.fixture
def twins(tmp_path: Path) -> list[Path]:
    return [
        make_run(tmp_path / "detour", TWO_PHASES, name="notes", run_file=DETOUR_FILE),
        make_run(tmp_path / "control", CONTROL, name="notes-control", run_file=CONTROL_FILE),
    ]


def page_words(folders: list[Path]) -> str:
    """The text of a comparison's page, for which no plot is drawn."""
    return words_of(page_html(folders))


def page_html(folders: list[Path]) -> str:
    runs = [read_run(folder) for folder in folders]
    return compare._page(runs, compare._labels(runs), [compare._settings(run) for run in runs], [])


def change_file(folder: Path, name: str, **changes: Any) -> None:
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    (folder / name).write_text(json.dumps(content | changes), encoding="utf-8")


def test_a_detour_beside_its_control(twins: list[Path], tmp_path: Path) -> None:
    page, shown = write_comparison(twins, tmp_path / "deep" / "comparison")
    assert page == tmp_path / "deep" / "comparison" / "compare.html"
    assert {path.name for path in page.parent.iterdir()} == PLOTS | {"compare.html"}
    html, text = page.read_text(encoding="utf-8"), words(page)
    assert html.count("<svg ") == html.count("</desc>") == len(PLOTS) and "<img" not in html
    assert not re.search(r"(src|href)=\"(?!#)|<script|<link|url\((?!#)|@import|https?://", html)
    first = (
        "After 13.1M tokens the held-out MLM loss of notes is 2.260 nats per token; that of notes-control is the same;"
    )
    assert text.partition("Comparison of 2 runs ")[2].partition("Comparison of 2 runs ")[2].startswith(first)
    assert " ".join(shown.split()).startswith(first) and "MLM loss" in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert "1: notes" in text and "2: notes-control" in text and text.count("Finished : 200 steps") == 2
    assert "Yes : notes-control and notes read the same documents in all 200 steps that both have done." in text
    assert "Yes : notes-control and notes were validated on the same text under the same masks." in text
    assert "Before training" in text and "At 13.1M tokens" in text and "Last of each run" not in text
    assert re.search(
        r"At 7\.86M tokens .*? MLM loss 2\.900 2\.400 \u22120\.500 MLM accuracy 46\.8% 54\.8% \+8\.0 points", text
    )
    assert "phases.detour.objective clm mlm phases.detour.mask_rate – 0.3" in text
    assert "seed 17" not in text
    assert "The same versions and machines, as far as the runs record them." in text
    assert "Tokens trained 13.1M 13.1M" in text and "Skipped updates 0 0" in text


def test_other_data_is_told_with_the_first_step(twins: list[Path]) -> None:
    change_records(twins[1], {150: {"data_crc": 1}, 151: {"data_crc": 2}})
    text = page_words(twins)
    assert "No : notes-control and notes did not read the same documents: 198 of 200 steps are equal, " in text
    assert "the first other one is step 150." in text


def test_equal_checksums_after_other_amounts_of_tokens_are_other_data(twins: list[Path]) -> None:
    change_records(twins[1], {200: {"tokens": 7}})
    assert "199 of 200 steps are equal, and the first other one is step 200." in page_words(twins)


def test_runs_without_checksums_cannot_be_told_apart(twins: list[Path]) -> None:
    change_records(twins[1], {step: {"data_crc": None} for step in range(1, 201)})
    assert "Unknown : cannot verify that notes-control and notes read the same data" in page_words(twins)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"sequences: 128": "sequences: 64"}, "Differences: validation.sequences."),
        ({"seed: 3": "seed: 4", "{sequence_length: 1024}": "{sequence_length: 512}"}, "data.sequence_length."),
        ({"every: 20": "every: 40"}, None),
    ],
)
def test_another_validation_is_told(twins: list[Path], change: dict[str, str], fault: str | None) -> None:
    content = CONTROL_FILE
    for old, new in change.items():
        content = content.replace(old, new)
    (twins[1] / "run.yaml").write_text(content, encoding="utf-8")
    text = page_words(twins)
    if fault:
        assert "No : notes-control and notes were validated differently, so their figures are not comparable. " in text
        assert fault in text
    else:
        assert "were validated on the same text" in text


def test_another_or_an_unnamed_validation_corpus_is_told(twins: list[Path]) -> None:
    change_file(twins[1], "environment.json", validation_corpora=[{"prefix": "x", "sha256": "ef" * 32}])
    assert "are not comparable. Differences: corpora, tokenizer." in page_words(twins)
    change_file(twins[1], "environment.json", validation_corpora=[])
    assert "Unknown : notes-control and notes do not both name their validation corpora." in page_words(twins)


def test_an_unfinished_run_is_drawn_as_far_as_it_goes(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "a", TWO_PHASES), make_run(tmp_path / "b", CONTROL, name="other", done=150)]
    text = page_words(folders)
    assert "Unfinished : step 150 of 200" in text
    assert "in all 150 steps that both have done" in text
    assert "At 7.86M tokens" in text and "At 13.1M tokens" not in text
    assert "Last of each run (at 13.1M, 9.18M tokens)" in text
    runs = [read_run(folder) for folder in folders]
    lines = plots._draw_gradient_norm(runs, ["1: a", "2: b"]).axes[-1].lines
    ends = {
        label: max(line.get_xdata()[-1] for line in lines if line.get_label() == label) for label in ("1: a", "2: b")
    }
    assert ends == {"1: a": 200 * TOKENS_PER_STEP, "2: b": 150 * TOKENS_PER_STEP}


def test_versions_and_machines_that_differ_are_named(twins: list[Path]) -> None:
    sessions = [{**ENVIRONMENT["sessions"][0], "ranks": 8}]
    change_file(twins[1], "environment.json", versions={"torch": "2.12.0", "numpy": "2.2.0"}, sessions=sessions)
    text = page_words(twins)
    assert "torch 2.11.0 2.12.0" in text and "deepspeed 0.19.4 –" in text and "ranks 4 8" in text
    assert "numpy 2.2.0" not in text


def test_figures_of_each_corpus_are_compared(twins: list[Path]) -> None:
    change_records(twins[0], {200: {"val_mlm_loss/notes": 2.0}})
    change_records(twins[1], {200: {"val_mlm_loss/notes": 2.25, "val_mlm_loss/web": 3.0}})
    text = page_words(twins)
    assert "MLM loss, notes 2.000 2.250 +0.250" in text and "MLM loss, web – 3.000 MLM" in text


def test_names_that_runs_share_get_their_folders(tmp_path: Path) -> None:
    def labels(*folders: str) -> list[str]:
        names = [make_run(tmp_path / folder, [("a", "mlm", 0.3, 1)], name="run") for folder in folders]
        return compare._labels([read_run(folder) for folder in names])

    assert labels("x", "y") == ["run (x)", "run (y)"]
    assert labels("x/z", "y/z") == [f"run ({tmp_path / 'x/z'})", f"run ({tmp_path / 'y/z'})"]


def test_text_from_the_runs_is_escaped(tmp_path: Path) -> None:
    folders = [
        make_run(tmp_path / "a", [("<i>x", "mlm", 0.3, 2)], name="<b>one</b>", run_file="seed: <u>\n"),
        make_run(tmp_path / "b", [("y", "mlm", 0.3, 2)], name="two"),
    ]
    html = page_html(folders)
    for raw in ("<b>one", "<i>x", "<u>"):
        assert raw not in html
    assert "&lt;b&gt;one" in html and "&lt;i&gt;x" in html and "&lt;u&gt;" in html


def test_what_cannot_be_compared_is_a_fault(twins: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for folders, fault in (
        (twins[:1], "two runs or more"),
        ([twins[0], tmp_path / "x" / ".." / "detour"], "given twice"),
        ([twins[0], tmp_path / "none"], "is this the folder of a run"),
    ):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(DetourError, match=fault):
            write_comparison(folders, out)
    for content, fault in (("a: [", "invalid YAML"), ("[]", "holds no settings")):
        (twins[1] / "run.yaml").write_text(content)
        with pytest.raises(DetourError, match=fault):
            write_comparison(twins, out)
    assert not out.exists()


def test_only_an_earlier_comparison_is_written_over(twins: list[Path], tmp_path: Path) -> None:
    with pytest.raises(DetourError, match="contains files other than"):
        write_comparison(twins, twins[0])
    (tmp_path / "file").write_text("x")
    with pytest.raises(DetourError, match="is a file"):
        write_comparison(twins, tmp_path / "file")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "compare.html").write_text("<html>")
    with pytest.raises(DetourError, match="contains files other than"):
        write_comparison(twins, foreign)
    out = tmp_path / "out"
    write_comparison(twins, out)
    bare = [make_run(tmp_path / name, [("a", "mlm", 0.3, 2)], name=name, validate_every=0) for name in ("c", "d")]
    text = words(write_comparison(bare, out)[0])
    assert "1: c" in text and "notes" not in text and "These runs have no validation figures." in text
    assert {path.name for path in out.glob("*.png")} == {"loss.png", "gradient_norm.png", "throughput.png"}


@pytest.mark.parametrize("plot", COMPARED, ids=lambda plot: plot.file)
def test_texts_do_not_overlap(plot: plots.Plot, twins: list[Path], tmp_path: Path) -> None:
    many = [
        *twins,
        five_phases(tmp_path / "five"),
        make_run(tmp_path / "one", done=1),
        make_run(tmp_path / "begun", done=0),
    ]
    labels = [f"{number}: {'a long name ' * number * number}$" for number in range(len(many))]
    figure = plot.draw([read_run(folder) for folder in many], labels)
    assert figure is not None
    refuse_overlaps(figure)


@pytest.mark.parametrize("plot", COMPARED, ids=lambda plot: plot.file)
def test_runs_that_have_not_begun_have_no_plot(plot: plots.Plot, tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / name, done=0, validate_every=0)) for name in "ab"]
    assert plot.draw(runs, ["1: a", "2: b"]) is None


def test_each_run_has_a_strip_unless_their_phases_are_the_same(twins: list[Path], tmp_path: Path) -> None:
    def strips(folders: list[Path]) -> list[list[str]]:
        figure = plots._draw_gradient_norm([read_run(folder) for folder in folders], ["1: a", "2: b"])
        return [[text.get_text() for text in axes.texts] for axes in figure.axes[:-1]]

    assert strips(twins) == [
        ["detour: CLM", "decay: MLM, 30% masked"],
        ["detour: MLM, 30% masked", "decay: MLM, 30% masked"],
    ]
    again = make_run(tmp_path / "again", CONTROL, done=150)
    assert strips([again, twins[1]]) == [["detour: MLM, 30% masked", "decay: MLM, 30% masked"]]


def test_runs_differ_in_color_and_in_line(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / str(number), done=30) for number in range(5)]
    figure = plots._draw_validation([read_run(folder) for folder in folders], [f"{number}: x" for number in range(5)])
    lines = [line for line in figure.axes[-1].lines if line.get_label().endswith(": x")]
    assert len({line.get_color() for line in lines}) == len({line.get_marker() for line in lines}) == 5
    assert len({str(line._dash_pattern) for line in lines}) == 5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"val_mlm_loss": 2.0},
            "notes is 2.260 nats per token; that of notes-control is 0.260 lower; with one run each",
        ),
        ({"val_mlm_loss": 2.5}, "notes is 2.260 nats per token; that of notes-control is 0.240 higher;"),
        ({"data_crc": 7}, "from that of seed and data order. The runs did not read the same data."),
    ],
)
def test_the_first_line_says_what_is_known(twins: list[Path], change: dict[str, Any], said: str) -> None:
    change_records(twins[1], {200: change})
    assert said in page_words(twins)


def test_the_first_line_claims_nothing_without_a_common_validation(twins: list[Path], tmp_path: Path) -> None:
    bare = make_run(tmp_path / "bare", TWO_PHASES, name="bare", validate_every=0)
    assert "No result yet: the runs have no held-out MLM loss at the same number of tokens." in page_words(
        [twins[0], bare]
    )
    (twins[1] / "run.yaml").write_text(CONTROL_FILE.replace("seed: 3", "seed: 4"))
    assert "Unknown which run is better: they were validated differently" in page_words(twins)
