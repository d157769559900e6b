"""Parts of the model that a phase freezes: no gradients, and neither weights nor Adam's state touched."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megatron_detour.config import RunConfig
from megatron_detour.model_parts import layers_of
from megatron_detour.parallel.zero import Zero
from megatron_detour.plan import PlannedPhase

HEAD = ("head.", "decoder.")


class PhasedAdamW(torch.optim.AdamW):
    """AdamW that leaves out groups flagged `frozen`; gradients are multiplied by `gradient_factor` before.

    Frozen by a learning rate of zero the moments would go on to decay; without gradients, momentum would go on to
    move the weights.
    """

    gradient_factor: torch.Tensor  # scalar on the device: what clips the gradient

    def step(self, closure=None):
        (group,) = self.param_groups  # ZeRO shows one at a time
        if group["frozen"]:
            return None
        for parameter in group["params"]:
            parameter.grad.mul_(self.gradient_factor)
        return super().step(closure)


def parameter_groups(model: nn.Module, config: RunConfig) -> list[dict[str, Any]]:
    """Matrices decay, norms and biases do not; parameters that are not frozen in the same phases are apart."""
    frozen = {phase.name: frozen_parameters(model, phase.freeze) for phase in config.phases}
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


def frozen_parameters(model: nn.Module, freeze: tuple[str, ...]) -> set[str]:
    """Names of the parameters of these parts, all of which the model has (see preflight.py)."""
    prefixes = tuple(prefix for part in freeze for prefix in _prefixes(part))
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


def freeze(zero: Zero, phase: PlannedPhase) -> None:
    """Freezes what the phase freezes and thaws all else."""
    for group in zero.groups:
        group.options["frozen"] = phase.name in group.options["frozen_in"]
        for _, parameter, _ in group.parameters:
            parameter.requires_grad_(not group.options["frozen"])


def _prefixes(part: str) -> tuple[str, ...]:
    if part == "head":
        return HEAD
    if not part.startswith("layers."):
        return (f"model.{part}.",)
    return tuple(f"model.layers.{number}." for number in layers_of(part))
