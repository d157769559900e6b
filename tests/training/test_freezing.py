"""A frozen part stays as it is to the bit, costs no gradients, and is not counted in the norm."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_detour.config import RunConfig
from megatron_detour.plan import Plan
from megatron_detour.training.freezing import frozen_parameters
from tests.harness import ROOT, run_ranks, slow
from tests.models import loss_of, microbatch, tiny
from tests.training.test_zero2 import LEARNING_RATE, microbatches, plain_optimizer, run_config, step_of

pytestmark = pytest.mark.integration

STEPS = 2  # of each phase
FREEZE = ("embeddings", "layers.0-2")


def phased(tensor: int, dtype: str = "fp32_cpu") -> RunConfig:
    """Three phases, the bottom frozen in the second."""
    config = run_config(tensor)
    phases = tuple(
        dataclasses.replace(config.phases[0], name=name, freeze=freeze)
        for name, freeze in (("a", ()), ("b", FREEZE), ("c", ()))
    )
    file = str(ROOT / "ds_configs" / f"zero2_{dtype}.json")
    return dataclasses.replace(config, phases=phases, deepspeed=file)


def phased_steps(tensor: int, dtype: str):
    """On every rank: the norms of all steps and (first rank) the state before each phase and at the end."""
    from megatron_detour.checkpoint.state import TrainingState, gather, scatter
    from megatron_detour.config.deepspeed import read_deepspeed_config
    from megatron_detour.training.engine import create_engine, start_distributed
    from megatron_detour.training.freezing import freeze

    config = phased(tensor, dtype)
    plan = Plan.of(config)
    state, _ = start_distributed(config)
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


def plain_steps():
    """The same with plain torch, whose AdamW leaves out parameters without gradients."""
    model, config = tiny(), phased(1)
    optimizer = plain_optimizer(model)
    norms = []
    for step in range(3 * STEPS):
        frozen = frozen_parameters(model, config.phases[step // STEPS].freeze)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        batches = microbatches(step)
        labeled = sum(len(b.labels) for b in batches)
        for batch in batches:
            (loss_of(model, batch).loss / labeled).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
    return norms, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("ranks", "tensor"),
    [(1, 1), (2, 2), slow(2, 1), slow(4, 2)],
)
def test_a_frozen_block_stays_to_the_bit_and_the_rest_trains_as_in_plain_torch(tmp_path, ranks, tensor):
    results = run_ranks(ranks, "tests.training.test_freezing:phased_steps", tmp_path, tensor, "fp32_cpu")
    norms, weights = plain_steps()
    for rank_norms, _ in results:
        assert rank_norms == pytest.approx(norms, rel=1e-5)
    states = results[0][1]
    check_frozen(states)
    for name, weight in weights.items():
        torch.testing.assert_close(states[3].weights[name], weight, rtol=0, atol=1e-5)


def test_in_bf16_too(tmp_path):
    check_frozen(run_ranks(1, "tests.training.test_freezing:phased_steps", tmp_path, 1, "bf16")[0][1])


def check_frozen(states) -> None:
    frozen = frozen_parameters(tiny(), FREEZE)
    before, after, last = states[1:]
    assert len(frozen) == 2 + 6 + 6 + 5  # layer 0 has no attention norm
    for name in before.weights:
        same = torch.equal(before.weights[name], after.weights[name])
        assert same == (name in frozen), name
        assert after.adam_steps[name] == (STEPS if name in frozen else 2 * STEPS)
        for kind in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(before.moments[kind][name], after.moments[kind][name]) == (name in frozen), name
        assert not torch.equal(after.weights[name], last.weights[name]), name
        assert last.adam_steps[name] == after.adam_steps[name] + STEPS


def flops_of_backward(freeze: tuple[str, ...]) -> int:
    model = tiny()
    frozen = frozen_parameters(model, freeze)
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
    parts = {p: frozen_parameters(tiny(), (p,)) for p in ("embeddings", "layers.1", "final_norm", "head")}
    assert parts["layers.1"] == {name for name in names if name.startswith("model.layers.1.")}
    assert parts["head"] == {"head.dense.weight", "head.norm.weight", "decoder.bias"}
