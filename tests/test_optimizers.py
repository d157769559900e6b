"""Each optimizer's update is its definition's, and its states are those that it names."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_detour.optimizers import KINDS, base
from megatron_detour.parallel import parameter_rms
from megatron_detour.parallel.state import ParallelState
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


class Longest(TorchDispatchMode):
    """Notes the most elements of a tensor that an operation made, views and results in place apart."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves(arguments) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize("name", [name for name in KINDS if name != "adamw"])  # torch's, fused on a GPU
def test_a_step_holds_no_other_vector_as_long_as_the_weights(name, monkeypatch):
    monkeypatch.setattr(base, "PIECE", 16)
    monkeypatch.setattr(parameter_rms, "SUMMED", 16)
    weight = torch.nn.Parameter(torch.randn(100))
    optimizer = KINDS[name]().build([{"params": [weight], "weight_decay": 0.1}])
    optimizer.rms = {weight: parameter_rms.ParameterRms([(weight, 0)], weight.data, ParallelState())}
    optimizer.param_groups[0]["lr"] = 1e-2
    for _ in range(2):  # the first makes the states
        weight.grad = torch.randn(100)
        with Longest() as longest:
            optimizer.step()
    assert 0 < longest.elements <= 16


@pytest.mark.parametrize("name", [name for name in KINDS if name != "adamw"])
def test_pieces_change_no_bit(name, monkeypatch):
    results = []
    for piece in (1000, 7):
        monkeypatch.setattr(base, "PIECE", piece)
        generator = torch.Generator().manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(100, generator=generator))
        optimizer = KINDS[name]().build([{"params": [weight], "weight_decay": 0.1}])
        optimizer.param_groups[0]["lr"] = 1e-2
        for _ in range(3):
            weight.grad = torch.randn(100, generator=generator)
            optimizer.step()
        results.append([weight.detach(), *(optimizer.state[weight][state] for state in KINDS[name].states)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_what_they_say_of_themselves():
    assert [kind().describe() for kind in KINDS.values()] == [
        "AdamW with betas 0.9 and 0.98, eps 1e-06",
        "Lion with betas 0.9 and 0.99",
        "StableAdamW with betas 0.9 and 0.98, eps 1e-06",
    ]
    assert [kind.bytes_per_parameter() for kind in KINDS.values()] == [12, 8, 12]
