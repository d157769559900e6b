"""AdamW (Loshchilov and Hutter, 2019), torch's, fused on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from megatron_detour.optimizers.base import Beta, Optimizer
from megatron_detour.settings import Range

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class AdamW(Optimizer):
    name = "adamw"
    label = "AdamW"
    states = ("exp_avg", "exp_avg_sq")

    betas: Annotated[tuple[Beta, Beta], "AdamW's decay rates of the moments"] = (0.9, 0.98)
    eps: Annotated[float, Range(above=0), "AdamW's epsilon"] = 1e-6

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        import torch

        fused = torch.cuda.is_available() or None
        return torch.optim.AdamW(groups, lr=0.0, betas=self.betas, eps=self.eps, fused=fused)
