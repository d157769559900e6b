"""A ZeRO-2 step is the plain AdamW step: same norm, same clipping, same weights, tied embedding included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_detour.config import from_dict
from tests.harness import ROOT, run_ranks
from tests.models import loss_of, microbatch, tiny

LEARNING_RATE, STEPS = 1e-3, 3
MICROBATCHES = [((30, 20), 0.5), ((50,), 0.0), ((11, 39), 0.3), ((50,), 0.9)]  # (lengths, share labelled) of a step


def run_config(tensor: int):
    return from_dict(
        {
            "name": "zero2",
            "folder": "unused",
            "model": {"config": {}, "tokenizer": "unused"},
            "data": {"corpora": [{"prefix": "unused"}], "sequence_length": 50},
            "batch": {"sequences": len(MICROBATCHES)},
            "phases": [{"name": "a", "objective": "clm", "tokens": 200, "learning_rate": {"peak": 1.0}}],
            "deepspeed": str(ROOT / "ds_configs" / "zero2_fp32_cpu.json"),
            "parallel": {"tensor": tensor},
            "optimizer": {"clip": 1.0, "weight_decay": 0.1},
        }
    )


def microbatches(step: int):
    return [
        microbatch(lengths, causal=step % 2 == 1, labelled=labelled, seed=10 * step + i)
        for i, (lengths, labelled) in enumerate(MICROBATCHES)
    ]


def zero2_steps(tensor: int, folder: str):
    """On every rank: norms of the steps and the full weights and moments (first rank), through the project's engine."""
    from megatron_detour.checkpoint.state import gather, scatter
    from megatron_detour.training.engine import create_engine, read_deepspeed_config, start_distributed

    config = run_config(tensor)
    state, _ = start_distributed(config)
    model = tiny(state)
    reference = dict(tiny().named_parameters())
    engine = create_engine(model, config, read_deepspeed_config(config.deepspeed), state)
    scatter(engine, state, lambda name: reference[name].detach())
    norms = []
    for step in range(STEPS):
        batches = microbatches(step)
        labelled = sum(len(b.labels) for b in batches)
        share = len(batches) // state.data_size
        mine = batches[state.data_rank * share : (state.data_rank + 1) * share]
        for group in engine.optimizer.param_groups:
            group["lr"] = LEARNING_RATE
        for batch in mine:
            engine.backward(loss_of(engine, batch).loss * state.data_size * share / labelled)
            engine.step()
        norms.append(float(engine.get_global_grad_norm()))
    return norms, gather(engine, state)


def plain_steps():
    model = tiny()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), eps=1e-6)
    norms = []
    for step in range(STEPS):
        batches = microbatches(step)
        labelled = sum(len(b.labels) for b in batches)
        for batch in batches:
            (loss_of(model, batch).loss / labelled).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
    states = {name: optimizer.state[p] for name, p in model.named_parameters()}
    return norms, dict(model.named_parameters()), states


@pytest.mark.parametrize(("ranks", "tensor"), [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_steps_equal_plain_torch(tmp_path, ranks, tensor):
    norms, weights, states = plain_steps()
    assert min(norms) > 1.0  # clipping is active
    results = run_ranks(ranks, "tests.training.test_zero2:zero2_steps", tmp_path, tensor, str(tmp_path))
    for rank_norms, _ in results:
        assert rank_norms == pytest.approx(norms, rel=1e-5)
    training = results[0][1]
    assert training.adam_steps == STEPS
    assert training.weights.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(
            training.weights[name], weight.detach(), rtol=0, atol=5e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
        for kind, by_name in training.moments.items():
            torch.testing.assert_close(by_name[name], states[name][kind], rtol=1e-3, atol=1e-6, msg=f"{kind} {name}")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"zero_optimization": {"stage": 3}}, "stage is 3"),
        ({"zero_optimization": {"stage": 2}, "train_batch_size": 8}, "remove train_batch_size"),
        ({"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}}, "fp16"),
    ],
)
def test_deepspeed_configurations_that_do_not_fit_are_refused(tmp_path, content, told):
    from megatron_detour.errors import DetourError
    from megatron_detour.training.engine import read_deepspeed_config

    file: Path = tmp_path / "ds.json"
    file.write_text(json.dumps(content))
    with pytest.raises(DetourError, match=told):
        read_deepspeed_config(str(file))
