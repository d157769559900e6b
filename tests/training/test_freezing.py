"""A frozen part stays as it is to the bit, costs no gradients, and is not counted in the norm."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_detour.config import RunConfig
from megatron_detour.optimizers import KINDS
from megatron_detour.plan import Plan
from tests.harness import ROOT, run_ranks, slow
from tests.models import loss_of, microbatch, tiny
from tests.optimizers import furthest, plain_optimizer
from tests.training.test_zero2 import DECAY, LEARNING_RATE, microbatches, run_config, step_of

pytestmark = pytest.mark.integration

STEPS = 2  # of each phase
FREEZE = ("embeddings", "layers.0-2")


def phased(tensor: int, dtype: str = "fp32_cpu", optimizer: str = "adamw") -> RunConfig:
    """Three phases, the bottom frozen in the second."""
    config = run_config(tensor, optimizer=optimizer)
    phases = tuple(
        dataclasses.replace(config.phases[0], name=name, freeze=freeze)
        for name, freeze in (("a", ()), ("b", FREEZE), ("c", ()))
    )
    file = str(ROOT / "ds_configs" / f"zero2_{dtype}.json")
    return dataclasses.replace(config, phases=phases, deepspeed=file)


def phased_steps(tensor: int, dtype: str):
    """On every rank, by optimizer: norms of all steps and (first rank) the state before each phase and at the end."""
    from megatron_detour.training.engine import start_distributed

    state, _ = start_distributed(phased(tensor, dtype))
    return {name: phased_steps_with(phased(tensor, dtype, name), state) for name in KINDS}


def phased_steps_with(config: RunConfig, state):
    from megatron_detour.checkpoint.state import TrainingState, gather, scatter
    from megatron_detour.config.deepspeed import read_deepspeed_config
    from megatron_detour.training.engine import create_engine
    from megatron_detour.training.freezing import freeze

    plan = Plan.from_config(config)
    model = tiny(state)
    reference = dict(tiny().named_parameters())
    zero = create_engine(model, config, read_deepspeed_config(config.deepspeed), state)
    scatter(zero, lambda name: reference[name].detach())
    zero.set_learning_rate(LEARNING_RATE)
    norms, states = [], [TrainingState() for _ in range(4)]
    for number, phase in enumerate(plan.phases):
        gather(zero, states[number])
        freeze(zero, phase)
        for step in range(number * STEPS, number * STEPS + STEPS):
            batches = microbatches(step)
            labeled = sum(len(b.labels) for b in batches)
            share = len(batches) // state.data_size
            mine = batches[state.data_rank * share : (state.data_rank + 1) * share]
            norms.append(step_of(zero, mine, labeled))
    gather(zero, states[3])
    return norms, states


def plain_steps(name: str):
    """The same with plain optimizers, which leave out parameters without gradients: norms, weights and states."""
    model, config = tiny(), phased(1)
    optimizer = plain_optimizer(name, model, LEARNING_RATE, DECAY)
    norms = []
    for step in range(3 * STEPS):
        frozen = model.shape.names_of(config.phases[step // STEPS].freeze)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        batches = microbatches(step)
        labeled = sum(len(b.labels) for b in batches)
        for batch in batches:
            (loss_of(model, batch).loss / labeled).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
    return norms, {name: (p.detach(), optimizer.state[p]) for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("ranks", "tensor"),
    [(1, 1), (2, 2), slow(2, 1), slow(4, 2)],
)
def test_a_frozen_block_stays_to_the_bit_and_the_rest_trains_as_in_plain_torch(tmp_path, ranks, tensor):
    results = run_ranks(ranks, "tests.training.test_freezing:phased_steps", tmp_path, tensor, "fp32_cpu")
    for optimizer, (_, states) in results[0].items():
        norms, expected = plain_steps(optimizer)
        for of_rank in results:
            assert of_rank[optimizer][0] == pytest.approx(norms, rel=1e-5)
        check_frozen(states)
        for name, (weight, state) in expected.items():
            error = (states[3].weights[name] - weight).abs()
            assert bool((error <= furthest(weight, state, LEARNING_RATE, 3 * STEPS)).all()), (optimizer, name)


def test_in_bf16_too(tmp_path):
    for _, states in run_ranks(1, "tests.training.test_freezing:phased_steps", tmp_path, 1, "bf16")[0].values():
        check_frozen(states)


def check_frozen(states) -> None:
    frozen = tiny().shape.names_of(FREEZE)
    before, after, last = states[1:]
    assert len(frozen) == 2 + 6 + 6 + 5  # layer 0 has no attention norm
    for name in before.weights:
        same = torch.equal(before.weights[name], after.weights[name])
        assert same == (name in frozen), name
        for kind in before.states:
            assert torch.equal(before.states[kind][name], after.states[kind][name]) == (name in frozen), name
        if "exp_avg_sq" in before.states:  # AdamW counts
            counts = [state.steps[name] for state in states[1:]]
            assert counts == ([STEPS, STEPS, 2 * STEPS] if name in frozen else [STEPS, 2 * STEPS, 3 * STEPS])
        assert not torch.equal(after.weights[name], last.weights[name]), name


def flops_of_backward(freeze: tuple[str, ...]) -> int:
    model = tiny()
    frozen = model.shape.names_of(freeze)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    loss = loss_of(model, microbatch((60, 40), causal=True, labeled=0.1)).loss
    counter = FlopCounterMode(display=False)
    with counter:
        loss.backward()
    return counter.get_total_flops()


def test_the_backward_pass_stops_above_a_frozen_bottom():
    """Three of five layers are frozen: nothing is left to do below; in the middle only weight gradients are saved."""
    whole, bottom, middle = (flops_of_backward(f) for f in ((), FREEZE, ("layers.1-3",)))
    assert bottom < 0.55 * whole
    assert bottom < middle < whole


def test_parts_are_whole_modules():
    names = {name for name, _ in tiny().named_parameters()}
    parts = {p: tiny().shape.names_of((p,)) for p in ("embeddings", "layers.1", "final_norm", "head")}
    assert parts["layers.1"] == {name for name in names if name.startswith("model.layers.1.")}
    assert parts["head"] == {"head.dense.weight", "head.norm.weight", "decoder.bias"}
