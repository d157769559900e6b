"""What a step costs beside its arithmetic: waits for the device, garbage collections, and a profile where asked for."""

from __future__ import annotations

import contextlib
import gc
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_detour.plan import Plan
from megatron_detour.training.trainer import manual_garbage_collection
from tests.harness import run_ranks
from tests.models import tiny
from tests.training.test_zero2 import microbatches, run_config

WAITS = ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__")


@contextlib.contextmanager
def counted_waits():
    """Counts what would wait for a GPU, by method and calling file; AdamW's own step count is on the host."""
    waits: Counter[str] = Counter()

    def counting(name: str, honest):
        def method(tensor, *arguments, **options):
            caller = sys._getframe(1).f_code.co_filename
            if f"torch{'/'}optim" not in caller:
                waits[f"{name} in {Path(caller).name}"] += 1
            return honest(tensor, *arguments, **options)

        return method

    honest = {name: getattr(torch.Tensor, name) for name in WAITS}
    for name, method in honest.items():
        setattr(torch.Tensor, name, counting(name, method))
    try:
        yield waits
    finally:
        for name, method in honest.items():
            setattr(torch.Tensor, name, method)


def a_step(loss: float, file: str = "zero2_fp32_cpu.json", optimizer: str = "adamw"):
    """On every rank, after an ordinary step: the waits of two steps whose loss is multiplied by `loss`, their figures,
    and whether weights or optimizer states moved."""
    from megatron_detour.config.deepspeed import read_deepspeed_config
    from megatron_detour.data.batches import RankBatch
    from megatron_detour.training.engine import create_engine, start_distributed
    from megatron_detour.training.guards import Guard
    from megatron_detour.training.trainer import Trainer

    config = replace(run_config(1, optimizer=optimizer), deepspeed=f"ds_configs/{file}")
    plan = Plan.from_config(config)
    state, device = start_distributed(config)
    deepspeed = read_deepspeed_config(config.deepspeed)
    zero = create_engine(tiny(state), config, deepspeed, state)
    trainer = object.__new__(Trainer)
    initial, preemption = SimpleNamespace(shape=zero.module.shape), SimpleNamespace(reason=lambda: None)
    trainer.run = SimpleNamespace(
        config=config, plan=plan, parallel=state, device=device, initial=initial, preemption=preemption
    )
    trainer.zero, trainer.guard = zero, Guard(config.guards)
    batches = microbatches(0)[state.data_rank :: state.data_size]
    batch = RankBatch(batches, 50 * len(batches), sum(len(b.labels) for b in batches), 0, 0)
    step = plan.at(0)
    trainer._enter(step)
    trainer.train_step(step, batch)
    before = whole_state(zero)
    accumulate = zero.accumulate
    zero.accumulate = lambda arguments, scale: accumulate(arguments, scale * loss)
    with counted_waits() as waits:
        figures, _ = trainer.train_step(step, batch)
        figures_again, _ = trainer.train_step(step, batch)
    moved = [not torch.equal(old, new) for old, new in zip(before, whole_state(zero), strict=True)]
    return dict(waits), [figures, figures_again], moved


def whole_state(zero) -> list[torch.Tensor]:
    """Copies of this rank's fp32 weights, the optimizer's states and its count of steps, and the model's weights."""
    held = [value for group in zero.groups for value in (group.partition, *zero.optimizer_state(group).values())]
    return [value.detach().clone() for value in (*held, *zero.module.parameters())]


@pytest.mark.parametrize(("ranks", "optimizer"), [(1, "adamw"), (2, "adamw"), (1, "lion"), (2, "stable_adamw")])
def test_a_step_waits_for_the_device_once(tmp_path, ranks, optimizer):
    arguments = (1.0, "zero2_fp32_cpu.json", optimizer)
    for waits, figures, moved in run_ranks(ranks, "tests.training.test_step:a_step", tmp_path, *arguments):
        # .cpu() of the one tensor; that it then is numpy's costs nothing.
        assert waits == {"cpu in trainer.py": 2, "numpy in trainer.py": 2}  # in two steps
        assert any(moved) and all(one["grad_norm"] > 0 and "skipped" not in one for one in figures)


@pytest.mark.parametrize("file", ["zero2_fp32_cpu.json", "zero2_bf16.json"])
def test_the_very_step_whose_gradient_is_nan_is_left_out(tmp_path, file):
    for waits, figures, moved in run_ranks(2, "tests.training.test_step:a_step", tmp_path, float("nan"), file):
        assert waits["cpu in trainer.py"] == 2
        assert not any(moved)
        assert all(one["skipped"].startswith("the gradient norm is") and one["loss"] > 0 for one in figures)


def test_the_collector_is_off_in_the_loop_and_on_again_after_it():
    before = gc.get_freeze_count()
    with pytest.raises(KeyError), manual_garbage_collection():
        assert not gc.isenabled() and gc.get_freeze_count() > before
        raise KeyError
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_steps_in_the_window_are_profiled(tmp_path):
    from megatron_detour.training.profiler import Profiler

    run = SimpleNamespace(folder=tmp_path, parallel=SimpleNamespace(rank=3), device=torch.device("cpu"))
    run.config = SimpleNamespace(profile=SimpleNamespace(steps=(2, 4)))

    def profiled(numbers: range) -> None:
        profiler = Profiler(run)
        for number in numbers:
            step = SimpleNamespace(number=number)
            profiler.before(step)
            torch.ones(number, 7).sum()
            profiler.after(step, is_last=number == numbers[-1])

    profiled(range(1, 4))  # a session that ends within the window, and the one that goes on
    profiled(range(4, 7))
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == [
        "steps-2-3-rank-3.json",
        "steps-4-4-rank-3.json",
    ]
    events = json.loads((tmp_path / "profile" / "steps-2-3-rank-3.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "aten::ones" for event in events) == 2
    run.config.profile = None
    profiled(range(1, 9))
    assert len(list((tmp_path / "profile").iterdir())) == 2
