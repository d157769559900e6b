"""A checkpoint of one split is the same checkpoint on any other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_detour.checkpoint import store
from megatron_detour.config import load
from megatron_detour.observe.sinks import read_metrics
from tests.harness import run_ranks, slow
from tests.injections.runs import PHASE_ENDS, Setup, begin, write_run_file

pytestmark = pytest.mark.integration

SPLITS = [
    Setup(4, 1),
    slow(Setup(1, 1)),
    slow(Setup(4, 4)),
]
HOME = Setup(4, 2)
SAVED, STEPS = 8, 10
# The recipe's rate; at a far higher one rounding grows, and a threshold would decide differently.
GENTLE = [f"phases.{name}.learning_rate.peak=2e-4" for name in ("warm", "detour", "decay")]
GENTLE += ["phases.decay.learning_rate.end=2e-5", "guards.spikes=report", "checkpoint.keep=20"]
GENTLE += ["validation.corpora=[]", "batch.micro_sequences=1"]  # for four data-parallel ranks in the batch's warm-up


@pytest.fixture(scope="module", params=["adamw", slow("lion"), slow("stable_adamw")])
def run_file(request, corpus, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("reshard") / "run.yaml"
    return write_run_file(path, corpus.prefix, corpus.tokenizer, request.param)


def finished(folder: Path, run_file: Path, setup: Setup) -> dict[int, dict]:
    """Runs to the end; the records by step."""
    session = begin(folder, run_file, setup, folder.with_suffix(".log"), overrides=GENTLE, NO_REPORT="1")
    assert set(session.wait()) == {0}, session.output()[-4000:]
    return {record["step"]: record for record in read_metrics(folder / "metrics.jsonl")}


@pytest.fixture(scope="module")
def home(run_file, tmp_path_factory) -> tuple[Path, dict[int, dict]]:
    """A whole run at TP2 x DP2 with all of its checkpoints, and its records."""
    folder = tmp_path_factory.mktemp("home") / "run"
    return folder, finished(folder, run_file, HOME)


def cut_back(folder: Path, to: Path, step: int) -> Path:
    """A copy of a run as it was when `step` had been saved."""
    shutil.copytree(folder, to)
    for checkpoint in store.find_checkpoints(to / "checkpoints"):
        if store.step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)
    assert store.step_of(store.latest(to / "checkpoints")) == step
    return to


def assert_close(ours: dict[int, dict], theirs: dict[int, dict], first: int) -> None:
    for step in range(first, min(first + STEPS, PHASE_ENDS[-1] + 1)):
        for key in ("loss", "grad_norm"):
            assert ours[step][key] == pytest.approx(theirs[step][key], rel=1e-5), (step, key)
        assert ours[step]["data_crc"] == theirs[step]["data_crc"]


@pytest.mark.parametrize("setup", SPLITS, ids=str)
def test_ten_steps_after_it_agree(home, run_file, tmp_path, setup):
    folder, records = home
    resumed = finished(cut_back(folder, tmp_path / "run", SAVED), run_file, setup)
    assert_close(resumed, records, SAVED + 1)


@pytest.mark.slow
def test_and_back_again(home, run_file, tmp_path):
    """Steps 1-8 at TP2 x DP2, 9-11 at TP4, the rest at TP2 x DP2."""
    folder, records = home
    finished(cut_back(folder, tmp_path / "there", SAVED), run_file, Setup(4, 4))
    back = finished(cut_back(tmp_path / "there", tmp_path / "back", 11), run_file, HOME)
    assert_close(back, records, 12)


def loaded(run_file: str, folder: str, overrides: list[str]):
    """On every rank: restores a run as a session does; what it then holds, on the first rank."""
    from megatron_detour.checkpoint.state import TrainingState, gather
    from megatron_detour.config.deepspeed import read_deepspeed_config
    from megatron_detour.data.phase_data import PhaseData
    from megatron_detour.plan import Plan
    from megatron_detour.preflight import preflight
    from megatron_detour.training.checkpoints import Checkpoints
    from megatron_detour.training.engine import create_engine, start_distributed
    from megatron_detour.training.guards import Guard
    from megatron_detour.training.initial_model import InitialModel
    from megatron_detour.training.run import Run

    config = load(run_file, [*GENTLE, *overrides, f"folder={folder}"])
    plan = Plan.from_config(config)
    start = InitialModel.from_preflight(preflight(config, plan))
    data = PhaseData(plan, config.data.order_seed, start.checked.vocabulary)
    state, device = start_distributed(config)
    zero = create_engine(start.shape.build(state), config, read_deepspeed_config(config.deepspeed), state)
    run = Run(config, plan, Path(folder), start, data, state, device, {}, choice=None, zero=zero, preemption=None)
    Checkpoints(run, Guard(config.guards)).restore()
    held = TrainingState()
    gather(zero, held)
    return held


@pytest.mark.parametrize("setup", SPLITS, ids=str)
def test_what_is_loaded_is_what_was_saved_to_the_bit(home, run_file, tmp_path, setup):
    run = cut_back(home[0], tmp_path / "run", SAVED)
    held = run_ranks(
        setup.ranks, "tests.training.test_resharding:loaded", tmp_path, str(run_file), str(run), setup.overrides
    )[0]
    checkpoint = store.checkpoint_folder(run / "checkpoints", SAVED)
    weights, optimizer = (load_file(checkpoint / f"{name}.safetensors") for name in ("model", "optimizer"))
    assert held.weights.keys() == weights.keys()
    assert all(torch.equal(held.weights[name], weights[name]) for name in weights)
    flat = {f"{kind}.{name}": value for kind, by_name in held.states.items() for name, value in by_name.items()}
    flat |= {f"step.{name}": torch.tensor(steps) for name, steps in held.steps.items()}
    assert flat.keys() == optimizer.keys()
    assert all(torch.equal(flat[name], optimizer[name]) for name in optimizer)
