"""StableAdamW (Wortsman et al., 2023): AdamW, with Adafactor's clipping of updates instead of that of gradients.

The learning rate of a parameter is divided by the root mean square of g / sqrt(v) over all of its elements, where that
is above 1: a gradient far larger than those before it no longer makes a large update.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from megatron_detour.optimizers.base import Beta, Optimizer, pieces
from megatron_detour.settings import Range

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class StableAdamW(Optimizer):
    name = "stable_adamw"
    label = "StableAdamW"
    states = ("exp_avg", "exp_avg_sq")

    betas: Annotated[tuple[Beta, Beta], "StableAdamW's decay rates of the moments"] = (0.9, 0.98)
    eps: Annotated[float, Range(above=0), "StableAdamW's epsilon"] = 1e-6

    def rates(
        self,
        gradient: torch.Tensor,
        states: dict[str, torch.Tensor],
        rate: float,
        rms: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        first, second = self.betas
        states["exp_avg"].lerp_(gradient, 1 - first)
        states["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        # The gradient has been used: the ratio, and then the rates, take its place.
        for part, square in pieces(gradient, states["exp_avg_sq"]):
            part.div_(self._root(square, states["step"]).clamp_(min=self.eps))
        return rms(gradient).clamp_(min=1).reciprocal_().mul_(rate)

    def update(
        self, weight: torch.Tensor, gradient: torch.Tensor, states: dict[str, torch.Tensor], rate: torch.Tensor
    ) -> None:
        mean = states["exp_avg"] / (1 - self.betas[0] ** states["step"].double())
        weight.sub_(mean.div_(self._root(states["exp_avg_sq"], states["step"]).add_(self.eps)).mul_(rate))

    def _root(self, square: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """Return the square root of the second moment, without the bias of its first value, zero."""
        return (square / (1 - self.betas[1] ** step.double())).sqrt_()
