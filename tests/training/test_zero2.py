"""A ZeRO-2 step is the optimizer's plain step: same norm, clipping and weights, tied embedding included."""

from __future__ import annotations

import copy

import pytest
import torch

from megatron_detour.config import from_dict
from megatron_detour.data.batches import MicroBatch
from megatron_detour.optimizers import KINDS
from tests.harness import ROOT, run_ranks, slow
from tests.models import loss_of, microbatch, tiny, together
from tests.optimizers import ROUNDING, furthest, plain_optimizer

pytestmark = pytest.mark.integration

LEARNING_RATE, STEPS = 2e-4, 3  # the recipe's peak
DECAY = 0.1
MICROBATCHES = [((30, 20), 0.5), ((50,), 0.0), ((11, 39), 0.3), ((50,), 0.9)]  # (lengths, share labeled) of a step


def run_config(tensor: int, sequence: bool = False, micro: int = 1, optimizer: str = "adamw"):
    return from_dict(
        {
            "name": "zero2",
            "folder": "unused",
            "model": {"config": {}, "tokenizer": "unused"},
            "data": {"corpora": [{"prefix": "unused"}], "sequence_length": 50},
            "batch": {"sequences": len(MICROBATCHES), "micro_sequences": micro},
            "phases": [{"name": "a", "objective": "clm", "tokens": 200, "learning_rate": {"peak": 1.0}}],
            "deepspeed": str(ROOT / "ds_configs" / "zero2_fp32_cpu.json"),
            "parallel": {"tensor": tensor, "sequence": sequence},
            "optimizer": {"name": optimizer, "clip": 1.0, "weight_decay": DECAY},
        }
    )


def microbatches(step: int) -> list[MicroBatch]:
    """Of 50 positions each."""
    return [
        microbatch(lengths, causal=step % 2 == 1, labeled=labeled, seed=10 * step + i)
        for i, (lengths, labeled) in enumerate(MICROBATCHES)
    ]


def zero2_steps(tensor: int, sequence: bool, micro: int, steps: int):
    """On every rank, through the project's engine: by optimizer, norms of the steps and (first rank) the full state
    after the first and after the last one."""
    from megatron_detour.training.engine import start_distributed

    state, _ = start_distributed(run_config(tensor, sequence, micro))
    return {name: steps_with(run_config(tensor, sequence, micro, name), state, steps) for name in KINDS}


def steps_with(config, state, steps: int, model_type: str = "modernbert"):
    from megatron_detour.checkpoint.state import TrainingState, gather, refuse_unequal_replicas, scatter
    from megatron_detour.config.deepspeed import read_deepspeed_config
    from megatron_detour.parallel.shard import spec_of
    from megatron_detour.training.engine import create_engine

    micro = config.batch.micro_sequences
    model = tiny(state, model_type=model_type)
    reference = dict(tiny(model_type=model_type).named_parameters())
    zero = create_engine(model, config, read_deepspeed_config(config.deepspeed), state)
    scatter(zero, lambda name: reference[name].detach())
    whole = {name: p for name, p in model.named_parameters() if spec_of(p) is None}
    norms, first, last = [], TrainingState(), TrainingState()
    for step in range(steps):
        batches = microbatches(step)
        labeled = sum(len(b.labels) for b in batches)
        batches = [together(batches[i : i + micro]) for i in range(0, len(batches), micro)]
        share = len(batches) // state.data_size
        mine = batches[state.data_rank * share : (state.data_rank + 1) * share]
        zero.set_learning_rate(LEARNING_RATE)
        norms.append(step_of(zero, mine, labeled))
        refuse_unequal_replicas(whole, state)
        if step == 0:
            gather(zero, first)
    gather(zero, last)
    return norms, first, last


def step_of(zero, mine: list[MicroBatch], labeled: int) -> float:
    """A step on this rank's micro-batches of `labeled` positions over all ranks; the norm of the gradient."""
    device = next(zero.module.parameters()).device
    scale = torch.tensor(1 / labeled, device=device)
    for batch in mine:
        zero.accumulate(batch.to(device).arguments, scale)
    norm = zero.sum_gradients()
    zero.step(norm)
    return float(norm)


def plain_steps(name: str, steps: int, model_type: str = "modernbert"):
    """Norms, and weights with the optimizer's states by name, after the first step and after the last."""
    model = tiny(model_type=model_type)
    optimizer = plain_optimizer(name, model, LEARNING_RATE, DECAY)
    norms, after = [], []
    for step in range(steps):
        batches = microbatches(step)
        labeled = sum(len(b.labels) for b in batches)
        for batch in batches:
            (loss_of(model, batch).loss / labeled).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        if step in (0, steps - 1):
            named = dict(model.named_parameters())
            after.append(copy.deepcopy({name: (p.detach(), optimizer.state[p]) for name, p in named.items()}))
    return norms, *after


SPLITS = [  # ranks, tensor-parallel size, sequence parallelism, sequences in a microbatch
    slow(1, 1, False, 1),
    (1, 1, False, 4),
    (2, 1, False, 2),
    slow(4, 1, False, 1),  # one rank without a label
    slow(2, 2, False, 1),
    (2, 2, True, 2),
    slow(4, 2, False, 1),
    slow(4, 2, True, 2),
]


@pytest.mark.parametrize(("ranks", "tensor", "sequence", "micro"), SPLITS)
def test_steps_equal_plain_torch_for_every_split(tmp_path, ranks, tensor, sequence, micro):
    results = run_ranks(ranks, "tests.training.test_zero2:zero2_steps", tmp_path, tensor, sequence, micro, STEPS)
    for optimizer in KINDS:
        norms, *expected = plain_steps(optimizer, STEPS)
        assert min(norms) > 1.0  # clipping is active
        for of_rank in results:
            assert of_rank[optimizer][0] == pytest.approx(norms, rel=ROUNDING)
        # Updates are clipped, by more than rounding could do.
        assert optimizer != "stable_adamw" or max(state["rms"] for _, state in expected[-1].values()) > 1.1
        for found, states, steps in zip(results[0][optimizer][1:], expected, (1, STEPS), strict=True):
            check_state(found, states, KINDS[optimizer].states, steps)


def check_state(found, expected, kinds: tuple[str, ...], steps: int, slack: float = 1.0) -> None:
    """Compares a gathered state with weights and states of a plain optimizer by name.

    `slack` is how many times as much as ModernBERT a family rounds.
    """
    assert found.weights.keys() == found.steps.keys() == expected.keys()
    assert tuple(found.states) == kinds
    for name, (weight, state) in expected.items():
        assert found.steps[name] == int(state.get("step", 0))
        share = (found.weights[name] - weight).abs() / furthest(weight, state, LEARNING_RATE, steps)
        assert share.max() <= slack, f"{name} after step {steps}"
        for kind, by_name in found.states.items():
            error = slack * ROUNDING * float(state[kind].abs().max())
            torch.testing.assert_close(by_name[name], state[kind], rtol=slack * 1e-4, atol=error, msg=f"{kind} {name}")


@pytest.mark.slow
def test_copies_stay_bit_equal_over_many_steps(tmp_path):
    """Each rank compares its copies with the other tensor ranks' after every step."""
    steps = 20
    norms, *_ = plain_steps("adamw", steps)
    for of_rank in run_ranks(4, "tests.training.test_zero2:zero2_steps", tmp_path, 2, True, 1, steps):
        assert of_rank["adamw"][0] == pytest.approx(norms, rel=1e-3)
