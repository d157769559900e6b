"""Parts of the model that a phase freezes: no gradients, and neither weights nor Adam's state touched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from megatron_detour.config import RunConfig
from megatron_detour.model_parts import layers_of
from megatron_detour.plan import PlannedPhase

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

HEAD = ("head.", "decoder.")


class PhasedAdamW(torch.optim.AdamW):
    """AdamW that leaves out groups flagged `frozen`, and any step that `permit` refuses.

    Frozen by a learning rate of zero the moments would go on to decay; without gradients, momentum would go on to
    move the weights.
    """

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        super().__init__(groups, **settings)
        self.permit = lambda: True

    def step(self, closure=None):
        # ZeRO shows one group at a time.
        if all(group["frozen"] for group in self.param_groups) or not self.permit():
            return None
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


def freeze(engine: DeepSpeedEngine, phase: PlannedPhase) -> None:
    """Freezes what the phase freezes and thaws all else."""
    zero = engine.optimizer
    for group, parameters in zip(zero.optimizer.param_groups, zero.bit16_groups, strict=True):
        group["frozen"] = phase.name in group["frozen_in"]
        for parameter in parameters:
            parameter.requires_grad_(not group["frozen"])


def _prefixes(part: str) -> tuple[str, ...]:
    if part == "head":
        return HEAD
    if not part.startswith("layers."):
        return (f"model.{part}.",)
    return tuple(f"model.layers.{number}." for number in layers_of(part))
