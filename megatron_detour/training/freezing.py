"""Freeze parts of the model for a phase: no gradients, and neither weights nor optimizer states change."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megatron_detour.config import RunConfig
from megatron_detour.model.language_model import LanguageModel
from megatron_detour.parallel.zero import Zero
from megatron_detour.plan import PlannedPhase


def skip_frozen(optimizer: torch.optim.Optimizer) -> None:
    """Make steps leave out groups flagged `frozen`, and first multiply gradients by `optimizer.gradient_factor`.

    With a learning rate of zero, states would keep decaying; without gradients, momentum would keep moving weights.
    The factor is a scalar on the device that clips the gradient.
    """
    update = optimizer.step

    def step(closure=None) -> None:
        (group,) = optimizer.param_groups  # ZeRO steps one group at a time
        if not group["frozen"]:
            for parameter in group["params"]:
                parameter.grad.mul_(optimizer.gradient_factor)
            update(closure)

    optimizer.step = step


def parameter_groups(model: LanguageModel, config: RunConfig) -> list[dict[str, Any]]:
    """Group parameters by weight decay (matrices only, not norms and biases) and by the phases that freeze them."""
    frozen = {phase.name: model.shape.names_of(phase.freeze) for phase in config.phases}
    groups: dict[tuple[bool, tuple[str, ...]], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        phases = tuple(phase for phase, names in frozen.items() if name in names)
        groups.setdefault((parameter.dim() > 1, phases), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": config.optimizer.weight_decay if matrices else 0.0,
            "frozen_in": phases,
            "frozen": False,
        }
        for (matrices, phases), parameters in sorted(groups.items(), key=lambda item: (not item[0][0], item[0][1]))
    ]


def freeze(zero: Zero, phase: PlannedPhase) -> None:
    """Freeze the phase's frozen parts and unfreeze all others."""
    for group in zero.groups:
        group.options["frozen"] = phase.name in group.options["frozen_in"]
        for _, parameter, _ in group.parameters:
            parameter.requires_grad_(not group.options["frozen"])
