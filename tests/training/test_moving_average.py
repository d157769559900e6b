"""The moving average that training keeps is that of the weights after every step, frozen and begun anew or not."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from megatron_detour.plan import Plan
from tests.harness import run_ranks, slow
from tests.models import tiny
from tests.training.test_freezing import FREEZE, STEPS
from tests.training.test_zero2 import LEARNING_RATE, microbatches, run_config, step_of

pytestmark = pytest.mark.integration

DECAY = 0.9


def averaged_steps(tensor: int, optimizer: str):
    """On every rank: the state (on the first one) at the start and after each step of three phases, of which the first
    and the last freeze the bottom and the second one resets the optimizer."""
    from megatron_detour.checkpoint.state import TrainingState, gather, reset_optimizer_state, scatter
    from megatron_detour.config.deepspeed import read_deepspeed_config
    from megatron_detour.training.engine import create_engine, start_distributed
    from megatron_detour.training.freezing import freeze

    config = run_config(tensor, optimizer=optimizer)
    phases = tuple(
        dataclasses.replace(config.phases[0], name=name, freeze=freeze)
        for name, freeze in (("a", FREEZE), ("b", ()), ("c", FREEZE))
    )
    config = dataclasses.replace(config, phases=phases, optimizer=dataclasses.replace(config.optimizer, ema=DECAY))
    state, _ = start_distributed(config)
    reference = dict(tiny().named_parameters())
    zero = create_engine(tiny(state), config, read_deepspeed_config(config.deepspeed), state)
    scatter(zero, lambda name: reference[name].detach())
    zero.set_learning_rate(LEARNING_RATE)
    held, states = TrainingState(), []
    gather(zero, held)
    states.append(copy.deepcopy(held))
    for number, phase in enumerate(Plan.from_config(config).phases):
        freeze(zero, phase)
        if phase.name == "b":
            reset_optimizer_state(zero)
        for step in range(number * STEPS, number * STEPS + STEPS):
            batches = microbatches(step)
            labeled = sum(len(batch.labels) for batch in batches)
            step_of(zero, batches[state.data_rank :: state.data_size], labeled)
            gather(zero, held)
            states.append(copy.deepcopy(held))
    return states


@pytest.mark.parametrize(
    ("ranks", "tensor", "optimizer"),
    [(2, 1, "adamw"), (2, 2, "lion"), slow(1, 1, "adamw"), slow(4, 2, "adamw")],
)
def test_it_is_the_average_of_all_weights_for_every_split(tmp_path, ranks, tensor, optimizer):
    start, *states = run_ranks(ranks, "tests.training.test_moving_average:averaged_steps", tmp_path, tensor, optimizer)[
        0
    ]
    frozen = tiny().shape.names_of(FREEZE)
    expected = {name: weight.double() for name, weight in start.weights.items()}
    for number, state in enumerate(states):
        assert state.states["ema"].keys() == (expected.keys() - frozen if number < STEPS else expected.keys())
        for name, weight in state.weights.items():
            expected[name] = DECAY * expected[name] + (1 - DECAY) * weight.double()
            kept = state.states["ema"].get(name, weight)  # a part that was never updated is its own average
            torch.testing.assert_close(kept.double(), expected[name], rtol=1e-6, atol=1e-7, msg=f"{number} {name}")
    for name in frozen:  # it moves on towards weights that stay
        before, after = (states[-n].states["ema"][name] for n in (2, 1))
        assert torch.equal(states[-2].weights[name], states[-1].weights[name]) and not torch.equal(before, after)
