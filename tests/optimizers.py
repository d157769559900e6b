"""Plain definitions of the optimizers, and how far rounding may take another computation of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

EPSILON, BETAS = 1e-6, {"adamw": (0.9, 0.98), "lion": (0.9, 0.99), "stable_adamw": (0.9, 0.98)}
# How far gradients summed in another order, or by other instructions, may be apart, as a share of the greatest of all:
# those of the first step by some last bits of fp32, those of later steps by what the first ones moved the weights.
ROUNDING, GROWN = 1e-5, 1e-3


class PlainLion(torch.optim.Optimizer):
    """Algorithm 2 of Chen et al. (2023) in numpy; `closest` is how near to zero what the sign is taken of has been."""

    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                if not state:
                    state |= {"exp_avg": torch.zeros_like(parameter), "closest": torch.full_like(parameter, torch.inf)}
                    state["step"] = 0
                state["step"] += 1
                weight, gradient = parameter.detach().numpy(), parameter.grad.numpy()
                momentum, closest = state["exp_avg"].numpy(), state["closest"].numpy()
                first, second = BETAS["lion"]
                interpolated = first * momentum + (1 - first) * gradient
                weight -= group["lr"] * (np.sign(interpolated) + group["weight_decay"] * weight)
                momentum[:] = second * momentum + (1 - second) * gradient
                closest[:] = np.minimum(closest, abs(interpolated))


class PlainStableAdamW(torch.optim.Optimizer):
    """Algorithm 2 of Wortsman et al. (2023) in numpy, with AdamW's correction of bias; `rms` is the largest so far."""

    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                if not state:
                    state |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                    state |= {"step": 0, "rms": 0.0}
                state["step"] += 1
                weight, gradient = parameter.detach().numpy(), parameter.grad.numpy()
                first, second = BETAS["stable_adamw"]
                mean, square = state["exp_avg"].numpy(), state["exp_avg_sq"].numpy()
                mean[:] = first * mean + (1 - first) * gradient
                square[:] = second * square + (1 - second) * gradient**2
                corrected = square / (1 - second ** state["step"])
                rms = np.sqrt(np.mean(gradient**2 / np.maximum(corrected, EPSILON**2)))
                rate = group["lr"] / max(1.0, float(rms))
                direction = mean / (1 - first ** state["step"]) / (np.sqrt(corrected) + EPSILON)
                weight -= rate * (direction + group["weight_decay"] * weight)
                state["rms"] = max(state["rms"], float(rms))


def plain_optimizer(name: str, model: torch.nn.Module, rate: float, decay: float) -> torch.optim.Optimizer:
    """Of one process; matrices alone decay."""
    groups = [
        {"params": [p for p in model.parameters() if (p.dim() > 1) is matrices], "weight_decay": decay * matrices}
        for matrices in (True, False)
    ]
    if name in ("lion", "stable_adamw"):
        return {"lion": PlainLion, "stable_adamw": PlainStableAdamW}[name](groups, {"lr": rate})
    return torch.optim.AdamW(groups, lr=rate, betas=BETAS["adamw"], eps=EPSILON)


def furthest(weight: torch.Tensor, state: dict[str, Any], rate: float, steps: int) -> torch.Tensor:
    """How far rounding can move each weight in `steps`: by an error of the gradient, and each step rounds the weight.

    AdamW's update is the rate times m / (sqrt(v) + eps), so that an error counts for more where gradients are small;
    StableAdamW's rate is AdamW's or smaller;
    Lion's is the rate, with another sign where an error crosses zero.
    """
    share = ROUNDING if steps == 1 else GROWN
    if "closest" in state:
        moved = 2.0 * (state["closest"] <= share * state["exp_avg"].abs().max() / (1 - BETAS["lion"][1]))
    else:
        size = (state["exp_avg_sq"] / (1 - BETAS["adamw"][1] ** int(state["step"]))).sqrt()
        moved = 2 * share * size.max() / (size + EPSILON)
    return steps * (rate * moved + 4 * torch.finfo(torch.float32).eps * (weight.abs() + steps * rate))
