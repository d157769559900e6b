"""What a run does when it is struck, short of time, or cannot go on. tests/injections strikes some hundred times."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_detour.checkpoint import store
from megatron_detour.corpus.train_tokenizer import train_tokenizer
from megatron_detour.errors import EXIT_INTERRUPTED
from megatron_detour.files import file_facts
from megatron_detour.observe.sinks import read_metrics
from tests.conftest import build
from tests.examples.test_sample import generate
from tests.harness import ROOT, slow
from tests.injections.campaign import Victim
from tests.injections.faults import wait_for
from tests.injections.runs import INTERVAL, PHASE_ENDS, Session, Setup, assert_same_run, begin, figures, write_run_file

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def run_file(corpus, tmp_path_factory) -> Path:
    return write_run_file(tmp_path_factory.mktemp("survival") / "run.yaml", corpus.prefix, corpus.tokenizer)


def started(folder: Path, run_file: Path, setup: Setup, *overrides: str, **more: str) -> Session:
    return begin(folder, run_file, setup, folder.with_suffix(".log"), overrides, **more)


@pytest.fixture(scope="module")
def whole(run_file, tmp_path_factory) -> Path:
    """The folder of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    session = started(folder, run_file, Setup())
    assert session.wait() == [0], session.output()[-4000:]
    return folder


@pytest.mark.parametrize(
    ("setup", "optimizer", "kinds"),
    [
        slow(
            Setup(1, 1, "bf16"),
            "adamw",
            ["damaged file", "SIGTERM", "full disk", "SIGKILL of all", "SIGUSR1", "SIGKILL of all"],
        ),
        slow(Setup(2, 2), "lion", ["SIGKILL of all", "SIGTERM"]),
        (
            Setup(2, 1),
            "adamw",
            ["SIGKILL of one rank", "rank that raises", "SIGKILL of all", "SIGTERM", "SIGKILL of all"],
        ),
    ],
    ids=str,
)
def test_a_run_that_is_struck_comes_out_to_the_bit(corpus, tmp_path, setup, optimizer, kinds):
    run_file = write_run_file(tmp_path / "run.yaml", corpus.prefix, corpus.tokenizer, optimizer)
    outcome = Victim(tmp_path / "victim", run_file, setup, seed=5).strike(kinds)
    assert outcome.struck.total() == len(kinds)
    assert outcome.finished >= 1


@pytest.fixture
def sample(tmp_path) -> list[str]:
    """Overrides that train the demo's recipe on the sample, in short steps."""
    generate.generate(tmp_path / "texts", 1.0, 0)
    texts = [tmp_path / "texts" / f"{name}.jsonl" for name in ("sample", "heldout")]
    train_tokenizer(texts[:1], tmp_path / "tokenizer", 1024)
    for text in texts:
        build([text], tmp_path / text.stem, tmp_path / "tokenizer")
    corpora = (("data", "sample"), ("validation", "heldout"))
    prefixes = [f"{key}.corpora.0.prefix={tmp_path / name}" for key, name in corpora]
    steps = [f"phases.{name}.tokens=100 steps" for name in ("mlm", "detour", "decay")]
    sizes = ["data.sequence_length=64", "batch.sequences=4", "batch.micro_sequences=1", "checkpoint.every=60 steps"]
    often = ["phases.mlm.learning_rate.warmup=20 steps", "validation.every=50 steps", "tensorboard=false"]
    return [f"model.tokenizer={tmp_path / 'tokenizer'}", *prefixes, *steps, *sizes, *often]


@pytest.mark.slow
def test_300_steps_on_the_sample_with_clipped_updates_resume_to_the_bit(sample, tmp_path):
    recipe, setup = ROOT / "examples/recipes/quickstart.yaml", Setup(2)
    overrides = (*sample, "optimizer.name=stable_adamw", "optimizer.clip=1000")
    whole = started(tmp_path / "whole", recipe, setup, *overrides)
    assert whole.wait() == [0, 0], whole.output()[-4000:]
    struck = started(tmp_path / "struck", recipe, setup, *overrides)
    wait_for(lambda: struck.step() >= 130, struck)
    struck.kill(number=signal.SIGTERM)
    assert struck.wait() == [EXIT_INTERRUPTED] * 2, struck.output()[-4000:]
    assert 130 <= struck.step() < 300
    again = started(tmp_path / "struck", recipe, setup, *overrides)
    assert again.wait() == [0, 0], again.output()[-4000:]
    assert_same_run(tmp_path / "struck", tmp_path / "whole", last=300)
    losses = [record["val_mlm_loss"] for record in figures(tmp_path / "whole") if "val_mlm_loss" in record]
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.slow
def test_a_run_with_hardly_any_time_comes_to_its_end(whole, run_file, tmp_path):
    """Each session trains a step at least, and asks to be started again."""
    folder, codes = tmp_path / "run", [EXIT_INTERRUPTED]
    for _ in range(PHASE_ENDS[-1]):
        if codes != [EXIT_INTERRUPTED]:
            break
        before = store.find_checkpoints(folder / "checkpoints")[-1:]
        session = started(folder, run_file, Setup(), "time_limit=2s")
        codes = session.wait()
        assert store.find_checkpoints(folder / "checkpoints")[-1:] != before, session.output()[-3000:]
    assert codes == [0], session.output()[-3000:]
    sessions = json.loads((folder / "environment.json").read_text())["sessions"]
    assert [s["ended"] for s in sessions] == ["the time limit of 2s"] * (len(sessions) - 1) + ["finished"]
    assert_same_run(folder, whole)


def test_gradients_that_are_no_numbers_are_left_out_and_then_end_the_run_with_a_state(run_file, tmp_path):
    folder, setup = tmp_path / "run", Setup(2, 1)
    session = started(folder, run_file, setup, "guards.patience=3", NO_NUMBER_FROM="6")
    assert session.wait() == [1, 1], session.output()[-3000:]
    told = session.output()
    assert "3 steps in a row were skipped, the last one, step 8 of phase detour, because the gradient norm is" in told
    assert "Traceback" not in told
    records = {record["step"]: record for record in read_metrics(folder / "metrics.jsonl")}
    assert [step for step, record in records.items() if "skipped" in record] == [6, 7, 8]
    assert records[6]["grad_norm"] is None and records[6]["loss"] > 0
    kept = folder / "inspect" / "step-00000008"
    store.verify(kept)
    state = json.loads((kept / "run_state.json").read_text())
    assert (state["read"][1], state["figures"]["step"]) == (state["tokens"], 8)
    weights = load_file(kept / "model.safetensors")
    before = load_file(store.checkpoint_folder(folder / "checkpoints", 5) / "model.safetensors")
    assert all(torch.equal(weights[name], before[name]) for name in weights)  # steps 6 to 8 changed nothing
    # Left alone, the same run goes on from its last checkpoint.
    assert set(started(folder, run_file, setup).wait()) == {0}


@pytest.mark.parametrize(("call", "step"), [(1, 0), (2, PHASE_ENDS[0])])
def test_a_validation_that_is_nan_is_kept_and_ends_the_run_with_a_state(run_file, tmp_path, call, step):
    folder = tmp_path / "run"
    session = started(folder, run_file, Setup(), NAN_VALIDATION=str(call))
    assert session.wait() == [1], session.output()[-3000:]
    assert "val_mlm_loss is NaN or infinite" in session.output() and "Traceback" not in session.output()
    last = read_metrics(folder / "metrics.jsonl")[-1]
    assert (last["step"], last["val_mlm_loss"]) == (step, None) and last["val_clm_loss"] > 0
    saved = [store.step_of(path) for path in store.find_checkpoints(folder / "checkpoints")]
    assert step not in saved
    if step:
        store.verify(folder / "inspect" / f"step-{step:08d}")


def test_a_report_that_cannot_be_written_ends_no_run(whole, run_file, tmp_path):
    session = started(tmp_path / "run", run_file, Setup(), NO_REPORT="1")
    assert session.wait() == [0], session.output()[-3000:]
    assert session.output().count("warning: no report: RuntimeError: no font") == len(PHASE_ENDS)
    assert figures(tmp_path / "run") == figures(whole)


def test_two_runs_cannot_write_one_folder(whole, run_file, tmp_path):
    first = started(tmp_path / "run", run_file, Setup())
    wait_for(lambda: first.step() >= 1, first)
    second = begin(tmp_path / "run", run_file, Setup(), tmp_path / "second.log")
    assert second.wait() == [1]
    assert "another run (process" in second.output()
    assert first.wait() == [0], first.output()[-3000:]
    assert_same_run(tmp_path / "run", whole)


def test_checkpoints_are_kept_by_rule(run_file, tmp_path):
    rules = ["checkpoint.every=2 steps", "checkpoint.keep=1", "checkpoint.keep_every=5 steps"]
    session = started(tmp_path / "run", run_file, Setup(), *rules)
    assert session.wait() == [0], session.output()[-3000:]
    kept = [store.step_of(folder) for folder in store.find_checkpoints(tmp_path / "run" / "checkpoints")]
    tokens = {record["step"]: record["tokens"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")}
    marked = [step for step in tokens if step and tokens[step] // 2560 > tokens[step - 1] // 2560]
    assert kept == sorted({0, *PHASE_ENDS, *marked})


def test_what_changed_between_sessions_is_told(whole, run_file, tmp_path):
    folder = tmp_path / "run"
    deepspeed = tmp_path / "deepspeed.json"
    shutil.copy(ROOT / "ds_configs" / "zero2_fp32_cpu.json", deepspeed)
    session = started(folder, run_file, Setup(), f"deepspeed={deepspeed}", RAISE_AT="4")
    assert session.wait() == [1]
    content = json.loads(deepspeed.read_text())
    more = [f"deepspeed={deepspeed}", "validation.seed=5"]
    deepspeed.write_text((ROOT / "ds_configs" / "zero2_bf16.json").read_text())
    session = begin(folder, run_file, Setup(), tmp_path / "refused.log", more)
    assert session.wait() == [1]
    assert "another run: the DeepSpeed file's bf16.enabled is not set there and True here" in session.output()
    content["zero_optimization"]["allgather_bucket_size"] = 5000
    deepspeed.write_text(json.dumps(content))
    session = begin(folder, run_file, Setup(), tmp_path / "second.log", more)
    assert session.wait() == [0], session.output()[-3000:]
    told = session.output()
    assert "changed since the last session: validation.seed was 0 and is 5; validation metrics before and after" in told
    assert (
        "changed since the last session: the DeepSpeed file's zero_optimization.allgather_bucket_size was not" in told
    )
    sessions = json.loads((folder / "environment.json").read_text())["sessions"]
    assert [s["ended"] for s in sessions] == ["error: injected", "finished"]


def test_a_disk_that_stays_away_ends_a_run_that_goes_on_where_it_has_saved(whole, run_file, tmp_path):
    """Exit status 75 puts a job back into the queue: not where the next session would get no further."""
    folder = tmp_path / "run"
    for ends, step, remedy in ((1, 2, False), (EXIT_INTERRUPTED, 9, True), (1, 10, False)):
        session = started(folder, run_file, Setup(), DISK_AWAY_FROM=str(step))
        assert session.wait() == [ends], session.output()[-3000:]
        told = session.output()
        (tmp_path / "run.log").unlink()
        assert told.count("error: ") == 1 and "metrics.jsonl: Input/output error" in told
        assert ("run the same command again to resume from the last checkpoint" in told) == remedy
        assert "Traceback" not in told
    assert started(folder, run_file, Setup()).wait() == [0]
    ended = [s["ended"].partition(": ")[0] for s in json.loads((folder / "environment.json").read_text())["sessions"]]
    assert ended == ["error", "disk unavailable", "error", "finished"]
    assert_same_run(folder, whole)


def test_a_disk_that_stays_away_from_another_rank_ends_the_run_in_the_same_way(run_file, tmp_path):
    folder = tmp_path / "run"
    # The second save waits for the first one, and the step after it reads what the rank fails at, a step ahead.
    session = started(folder, run_file, Setup(2), TEXT_AWAY_FROM=str(2 * INTERVAL + 2))
    assert session.wait() == [EXIT_INTERRUPTED] * 2, session.output()[-3000:]
    assert "run the same command again to resume from the last checkpoint" in session.output()
    noted = json.loads((folder / "environment.json").read_text())["sessions"][-1]
    assert noted["ended"].startswith("disk unavailable: rank 1 on ")
    assert noted["saved"] >= INTERVAL


def test_a_run_whose_folder_is_removed_says_so_and_ends(run_file, tmp_path):
    session = started(tmp_path / "run", run_file, Setup(), FOLDER_GONE_AT="2")
    assert session.wait() == [1], session.output()[-3000:]
    told = session.output()
    assert "Traceback" not in told
    assert told.count("error: ") == 1 and f"error: {tmp_path / 'run'}" in told


def test_a_run_goes_on_with_its_corpus_elsewhere_and_its_tokenizer_gone(whole, corpus, run_file, tmp_path):
    folder = tmp_path / "run"
    (tmp_path / "a").mkdir()
    for kind in ("bin", "idx", "manifest.json"):
        shutil.copy(f"{corpus.prefix}.{kind}", tmp_path / "a" / f"corpus.{kind}")
    shutil.copytree(corpus.tokenizer, tmp_path / "a" / "tokenizer")

    def read_from(place: str) -> list[str]:
        return [f"data.corpora.0.prefix={tmp_path / place / 'corpus'}", f"model.tokenizer={tmp_path / 'a/tokenizer'}"]

    assert started(folder, run_file, Setup(), *read_from("a"), RAISE_AT="9").wait() == [1]
    (tmp_path / "a").rename(tmp_path / "b")
    session = started(folder, run_file, Setup(), *read_from("b"))
    assert session.wait() == [0], session.output()[-3000:]
    assert f"was '{tmp_path / 'a/corpus'}' and is '{tmp_path / 'b/corpus'}'; same content" in session.output()
    assert "no longer exists; using" in session.output()
    assert_same_run(folder, whole)


def test_a_checkpoint_of_another_version_is_not_resumed(whole, run_file, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    newest = store.find_checkpoints(folder / "checkpoints")[-1]
    state = json.loads((newest / "run_state.json").read_text())
    (newest / "run_state.json").write_text(json.dumps(state | {"format": 1}))
    listing = json.loads((newest / store.LISTING).read_text())
    (newest / store.LISTING).write_text(json.dumps(listing | {"run_state.json": file_facts(newest / "run_state.json")}))
    environment = json.loads((folder / "environment.json").read_text())
    del environment["sessions"][-1]["ended"]  # killed, so that the run is not known to be finished
    (folder / "environment.json").write_text(json.dumps(environment))
    session = started(folder, run_file, Setup())
    assert session.wait() == [1]
    assert f"error: {newest}: saved by another version of this project" in session.output()
    assert "Traceback" not in session.output()
