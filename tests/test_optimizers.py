"""Each optimizer's update is its definition's, and its states are those that it names."""

from __future__ import annotations

import pytest
import torch

from megatron_detour.optimizers import KINDS
from tests.optimizers import plain_optimizer

RATE, DECAY = 1e-2, 0.1


@pytest.mark.parametrize("name", KINDS)
def test_the_update_is_the_definitions(name):
    models = [torch.nn.Linear(7, 5), torch.nn.Linear(7, 5)]
    models[1].load_state_dict(models[0].state_dict())
    plain = plain_optimizer(name, models[1], RATE, DECAY)
    groups = [{key: group[key] for key in ("params", "weight_decay")} for group in plain.param_groups]
    for group, parameter in zip(groups, models[0].parameters(), strict=True):
        group["params"] = [parameter]
    ours = KINDS[name]().build(groups)
    for group in ours.param_groups:
        group["lr"] = RATE
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
            one.grad = (step + 1) * torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        ours.step()
        plain.step()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
        assert set(ours.state[one]) - {"step"} == {*KINDS[name].states}
        for state in KINDS[name].states:
            torch.testing.assert_close(ours.state[one][state], plain.state[other][state])
        assert ours.state[one]["step"] == plain.state[other]["step"] == 5
        assert plain.state[other].get("rms", 2) > 1  # updates are clipped


def test_what_they_say_of_themselves():
    assert [kind().describe() for kind in KINDS.values()] == [
        "AdamW with betas 0.9 and 0.98, eps 1e-06",
        "Lion with betas 0.9 and 0.99",
        "StableAdamW with betas 0.9 and 0.98, eps 1e-06",
    ]
    assert [kind.bytes_per_parameter() for kind in KINDS.values()] == [12, 8, 12]
