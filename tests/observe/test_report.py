from __future__ import annotations

import base64
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_detour.errors import DetourError
from megatron_detour.observe import plots
from megatron_detour.observe.report import write_report
from megatron_detour.observe.run_folder import byte_size, compact, rate_words, read_run

TOKENS_PER_STEP = 65_536
PNG = b"\x89PNG\r\n\x1a\n"
THREE_PHASES = [("warm-up", "mlm", 0.3, 60), ("detour", "clm", None, 180), ("decay", "mlm", 0.15, 60)]
TWO_PHASES = [("detour", "clm", None, 120), ("decay", "mlm", 0.3, 80)]
ALL_PLOTS = {"loss.png", "learning_rate.png", "validation.png", "throughput.png"}


def make_plan(name: str, phases: list[tuple[str, str, float | None, int]]) -> dict[str, Any]:
    entries, first = [], 1
    for title, objective, mask_rate, steps in phases:
        entries.append(
            {
                "name": title,
                "objective": objective,
                "mask_rate": mask_rate,
                "first_step": first,
                "steps": steps,
                "tokens": steps * TOKENS_PER_STEP,
                "start_tokens": (first - 1) * TOKENS_PER_STEP,
                "end_tokens": (first - 1 + steps) * TOKENS_PER_STEP,
                "learning_rate": {"peak": 5e-4, "warmup_tokens": 655_360, "shape": "cosine", "end": 5e-5},
            }
        )
        first += steps
    return {
        "name": name,
        "tokens_per_step": TOKENS_PER_STEP,
        "total_steps": first - 1,
        "total_tokens": (first - 1) * TOKENS_PER_STEP,
        "sequence_length": 1024,
        "sequences_per_step": 64,
        "phases": entries,
    }


def make_records(plan: dict[str, Any], done: int, validate_every: int) -> list[dict[str, Any]]:
    noise = random.Random(7)
    records: list[dict[str, Any]] = []
    if validate_every:
        records.append({"step": 0, "val_mlm_loss": 2.61, "val_mlm_accuracy": 0.512, "val_clm_loss": 9.4})
    for phase in plan["phases"]:
        for index in range(phase["steps"]):
            step = phase["first_step"] + index
            if step > done:
                return records
            clm = phase["objective"] == "clm"
            share = index / phase["steps"]
            loss = 3.4 + 6.0 * math.exp(-9 * share) if clm else 2.1 + 0.9 * math.exp(-7 * share)
            warm = min(1.0, (index + 1) / 10)
            record = {
                "step": step,
                "tokens": step * TOKENS_PER_STEP,
                "phase": phase["name"],
                "objective": phase["objective"],
                "loss": loss + noise.gauss(0, 0.06),
                "lr": warm * (5e-5 + 4.5e-4 * 0.5 * (1 + math.cos(math.pi * share))),
                "grad_norm": 0.8,
                "tokens_per_second": (9_000 if step == 1 else 152_000) * noise.uniform(0.96, 1.02),
                "seconds": 7.3 if step == 1 else 0.43,
                "data_wait_seconds": 0.004,
                "memory_bytes": 41_300_000_000,
            }
            if validate_every and step % validate_every == 0:
                total = step / plan["total_steps"]
                record |= {
                    "val_mlm_loss": 2.61 - 0.35 * total + (0.5 if clm else 0),
                    "val_mlm_accuracy": 0.512 + 0.06 * total - (0.08 if clm else 0),
                    "val_clm_loss": 3.6 + 5.8 * math.exp(-5 * total),
                }
            records.append(record)
    return records


ENVIRONMENT = {
    "sessions": [
        {
            "started": "2026-03-02T09:14:05+00:00",
            "step": 0,
            "ranks": 4,
            "tensor_parallel": 2,
            "device": "NVIDIA H200",
            "host_cores": 64,
            "attention": "flash2",
            "kernels": "triton",
        },
        {
            "started": "2026-03-02T18:40:51+00:00",
            "step": 100,
            "ranks": 4,
            "tensor_parallel": 2,
            "device": "NVIDIA H200",
            "host_cores": 64,
            "attention": "flash2",
            "kernels": "triton",
        },
    ],
    "versions": {"torch": "2.11.0", "deepspeed": "0.19.4", "transformers": "5.0.1", "numpy": "2.2.0"},
    "model": {"parameters": 149_655_232, "hidden_size": 768, "layers": 22},
    "corpora": [
        {
            "prefix": "data/web",
            "weight": 0.7,
            "documents": 1_204_113,
            "tokens": 983_120_442,
            "sha256": "cd" * 32,
            "tokenizer_sha256": "ab" * 32,
            "sources": [{"path": "web-<b>0</b>.jsonl.gz", "bytes": 2_400_112_221}, {"path": "web-1.jsonl", "bytes": 7}],
        },
    ],
    "validation_corpora": [
        {
            "prefix": "data/held-out",
            "weight": 1.0,
            "documents": 2000,
            "tokens": 1_500_200,
            "tokenizer_sha256": "ab" * 32,
            "sources": [{"path": "held-out.jsonl", "bytes": 5_200_111}],
        }
    ],
    "unigram_loss": 7.42,
}


def make_run(
    folder: Path,
    phases: list[tuple[str, str, float | None, int]] = THREE_PHASES,
    *,
    name: str = "camembert-detour",
    done: int | None = None,
    validate_every: int = 20,
    environment: dict[str, Any] = ENVIRONMENT,
) -> Path:
    plan = make_plan(name, phases)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    (folder / "run.yaml").write_text(f"name: '{name}'\nseed: 17\nbatch: {{tokens: 65536}}\n", encoding="utf-8")
    (folder / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    records = make_records(plan, plan["total_steps"] if done is None else done, validate_every)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return folder


def plot_names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "plots").iterdir()}


def words(page: Path) -> str:
    """The page's text without its tags, in single spaces."""
    html = re.sub(r"<style>.*?</style>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


def test_a_finished_run_of_three_phases(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    assert not (folder / "plots").exists()
    page = write_report(folder)
    assert page == folder / "report.html"
    assert plot_names(folder) == ALL_PLOTS
    html, text = page.read_text(encoding="utf-8"), words(page)
    embedded = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    pngs = {path.read_bytes() for path in (folder / "plots").iterdir()}
    assert {base64.b64decode(image) for image in embedded} == pngs
    assert all(png.startswith(PNG) for png in pngs)
    assert "Finished : 300 steps" in text
    assert "Validation MLM loss 2.610 → 2.260 \u22120.350, step 0 to 300" in text
    assert "Validation MLM accuracy 51.2% → 57.2% +6.0 points" in text
    assert "Tokens trained 19.7M of 19.7M planned" in text
    assert "Training time 2m16s" in text  # 7.3 s + 299 times 0.43 s
    assert "Mean throughput 145k tokens per second" in text
    assert "Waiting for data 0.9%" in text
    assert "decay MLM 15% 60 3.93M 15.7M – 19.7M rises to 0.0005 over 655k tokens" in text
    assert "149,655,232" in text and "2026-03-02T18:40:51+00:00 (resumed) 100" in text
    assert "deepspeed 0.19.4" in text and "seed: 17" in text and "7.420" in text
    assert "2.24 GiB" in text and "abababababab" in text and "cdcdcdcdcdcd" in text
    assert not list(folder.rglob("*.part"))


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    html = write_report(make_run(tmp_path)).read_text(encoding="utf-8")
    assert "<script" not in html and "<link" not in html
    assert not re.search(r"(src|href)=\"(?!data:)", html)
    assert not re.search(r"url\(|@import|https?://", html)


def test_text_from_the_run_is_escaped(tmp_path: Path) -> None:
    phases = [("<i>one</i> $x^", "mlm", 0.3, 5), ("two & co", "clm", None, 5)]
    page = write_report(make_run(tmp_path, phases, name="<script>alert(1)</script>"))
    html = page.read_text(encoding="utf-8")
    for raw in ("<script>", "<i>one", "<b>0</b>"):
        assert raw not in html
    for escaped in ("&lt;script&gt;alert(1)", "&lt;i&gt;one&lt;/i&gt;", "web-&lt;b&gt;0", "two &amp; co"):
        assert escaped in html


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path, TWO_PHASES, done=140))
    text = words(page)
    assert "Unfinished : step 140 of 200" in text and "Finished :" not in text
    assert "decay MLM 30% 20 of 80" in text
    assert "Tokens trained 9.18M of 13.1M planned" in text


def test_a_run_without_validation_has_no_such_plot(tmp_path: Path) -> None:
    folder = make_run(tmp_path, validate_every=0, environment={**ENVIRONMENT, "unigram_loss": None})
    (folder / "plots").mkdir()
    (folder / "plots" / "validation.png").write_bytes(b"stale")
    text = words(write_report(folder))
    assert plot_names(folder) == ALL_PLOTS - {"validation.png"}
    assert "This run has no validation figures." in text


@pytest.mark.parametrize("done", [1, 2])
def test_a_run_of_few_steps(tmp_path: Path, done: int) -> None:
    folder = make_run(tmp_path, [("only", "mlm", 0.3, 2)], done=done, validate_every=2)
    write_report(folder)
    assert plot_names(folder) == ALL_PLOTS


def test_a_run_that_has_not_begun(tmp_path: Path) -> None:
    folder = make_run(tmp_path, done=0, validate_every=0)
    (folder / "metrics.jsonl").unlink()
    (folder / "environment.json").unlink()
    text = words(write_report(folder))
    assert "step 0 of 300" in text and "No step has been trained yet." in text


def test_a_single_validation_is_no_change(tmp_path: Path) -> None:
    text = words(write_report(make_run(tmp_path, done=10)))
    assert "Validation MLM loss 2.610 at step 0, its only validation" in text


def test_a_folder_that_is_no_run_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(DetourError, match="folder of a run"):
        write_report(tmp_path)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(DetourError, match="not valid JSON"):
        write_report(tmp_path)


def test_a_step_written_twice_counts_once(tmp_path: Path) -> None:
    folder = make_run(tmp_path, done=3, validate_every=0)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 99.0}\n{"step": 4, "lo')
    assert [record["loss"] for record in read_run(folder).records][-1] == 99.0
    assert read_run(folder).done_steps == 3


def test_the_plots_show_what_they_should(tmp_path: Path) -> None:
    figure = plots._draw_validation(read_run(make_run(tmp_path)))
    loss, accuracy = figure.axes[1:]
    labels = loss.get_legend_handles_labels()[1]
    assert "unigram distribution of the corpus" in labels
    assert labels.count("objective switch") == 2 and labels.count("resumed from a checkpoint") == 1
    switches = [line.get_xdata()[0] for line in loss.lines if line.get_label() == "objective switch"]
    assert switches == [60 * TOKENS_PER_STEP, 240 * TOKENS_PER_STEP]
    resumed = next(line for line in loss.lines if line.get_label() == "resumed from a checkpoint")
    assert resumed.get_xdata()[0] == 100 * TOKENS_PER_STEP
    low, high = loss.get_ylim()
    assert low < 2.26 and high > 9.4 and accuracy.get_ylabel() == "MLM accuracy"
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(legend) == len(set(legend)) == 5


def test_colour_follows_the_objective(tmp_path: Path) -> None:
    figure = plots._draw_loss(read_run(make_run(tmp_path)))
    colours = {line.get_label(): line.get_color() for line in figure.axes[1].lines}
    assert colours["MLM loss"] == plots.COLOURS["mlm"]
    assert colours["CLM loss"] == plots.COLOURS["clm"]


def test_the_first_outliers_do_not_set_the_range(tmp_path: Path) -> None:
    folder = make_run(tmp_path, TWO_PHASES)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    spoilt = [json.loads(line) for line in lines]
    spoilt[1]["loss"] = 500.0
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in spoilt))
    figure = plots._draw_loss(read_run(folder))
    axes = figure.axes[1]
    assert 5 < axes.get_ylim()[1] < 12
    assert any("1 step above the range shown" in text.get_text() for text in axes.texts)


def test_a_steady_fall_is_shown_whole(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path, [("detour", "clm", None, 600)], validate_every=0))
    axes = plots._draw_loss(run).axes[1]
    assert axes.get_ylim()[1] > max(record["loss"] for record in run.records)
    assert not axes.texts


def test_names_of_phases_stay_inside_their_bands(tmp_path: Path) -> None:
    phases = [
        ("a long name for a warm-up phase", "mlm", 0.3, 30),
        ("x", "clm", None, 200),
        ("a narrow cooldown", "mlm", 0.15, 4),
    ]
    run = read_run(make_run(tmp_path, phases))
    strip = plots._draw_loss(run).axes[0]
    bounds = strip.get_window_extent()
    for phase, text in zip(run.phases, strip.texts, strict=True):
        extent = text.get_window_extent()
        left, right = (
            bounds.x0 + bounds.width * phase[key] / run.done_tokens for key in ("start_tokens", "end_tokens")
        )
        assert extent.x0 >= left - 1 and extent.x1 <= right + 1, phase["name"]
        assert bounds.y0 <= extent.y0 and extent.y1 <= bounds.y1, phase["name"]
    assert [text.get_text() for text in strip.texts] == ["1", "x: CLM", "3"]
    assert strip.get_title(loc="right") == "1 a long name for a warm-up phase,  3 a narrow cooldown"


def test_smoothing_keeps_a_straight_line_and_damps_noise() -> None:
    assert plots._smoothed([float(value) for value in range(200)])[:-3] == pytest.approx(range(197))
    noisy = plots._smoothed([(-1.0) ** step for step in range(600)])
    assert max(map(abs, noisy[20:-20])) < 0.1


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (950, "950"),
        (12_345, "12.3k"),
        (999_999, "1M"),
        (1_500_000, "1.5M"),
        (100_000_000, "100M"),
        (2e9, "2B"),
        (1.2e12, "1.2T"),
    ],
)
def test_compact(number: float, text: str) -> None:
    assert compact(number) == text


@pytest.mark.parametrize(("count", "text"), [(7, "7 B"), (1024, "1 KiB"), (3_565_158, "3.4 MiB"), (5e13, "45.5 TiB")])
def test_byte_size(count: float, text: str) -> None:
    assert byte_size(count) == text


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        ({"peak": 5e-4, "warmup_tokens": 0, "shape": "constant", "end": 5e-4}, "starts at 0.0005, then stays"),
        (
            {"peak": 2e-5, "warmup_tokens": 2_000_000, "shape": "linear", "end": 0.0},
            "rises to 2e-05 over 2M tokens, then follows a straight line to 0",
        ),
        (
            {"peak": 1e-3, "warmup_tokens": 0, "shape": "odd", "end": 1e-4},
            "starts at 0.001, then follows odd to 0.0001",
        ),
    ],
)
def test_rate_words(rate: dict[str, Any], text: str) -> None:
    assert rate_words(rate) == text
