"""Lion (Chen et al., 2023): the sign of an interpolation between momentum and gradient.

Every element moves by the learning rate, so use one 3 to 10 times smaller than AdamW's, and a weight decay larger by
the same factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from megatron_detour.optimizers.base import Beta, Optimizer

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Lion(Optimizer):
    name = "lion"
    label = "Lion"
    states = ("exp_avg",)

    betas: Annotated[
        tuple[Beta, Beta], "Lion's weights of the momentum: in the update, and in the next step's momentum"
    ] = (0.9, 0.99)

    def update(
        self, weight: torch.Tensor, gradient: torch.Tensor, states: dict[str, torch.Tensor], rate: float
    ) -> None:
        now, following = self.betas
        momentum = states["exp_avg"]
        weight.sub_(momentum.lerp(gradient, 1 - now).sign_(), alpha=rate)
        momentum.lerp_(gradient, 1 - following)
