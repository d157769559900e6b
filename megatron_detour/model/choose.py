"""What this machine offers and a run asks for, as the model's Compute; the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_detour.errors import DetourError
from megatron_detour.kernels.choose import choose_kernels
from megatron_detour.model.backends import choose_attention
from megatron_detour.model.modernbert import Compute


@dataclass(frozen=True)
class Choice:
    """The compute of a run with the names of its parts, and why faster ones were passed over."""

    compute: Compute
    attention: str
    kernels: str
    passed_over: list[str]

    def __str__(self) -> str:
        chosen = f"attention {self.attention}, kernels {self.kernels}, recompute {self.compute.recompute}"
        return "\n  passed over: ".join([chosen, *self.passed_over])


def choose_compute(
    attention: str, kernels: str, recompute: str, head_dim: int, device: torch.device, dtype: torch.dtype
) -> Choice:
    """Every rank must call it, and all return, or all raise DetourError: when what was asked for is not there or
    computes something else on a rank's device, or when ranks would compute in different ways."""
    choice, fault = None, None
    try:
        chosen_attention, function, passed_over = choose_attention(attention, device, dtype, head_dim)
        chosen_kernels, implementations, slower = choose_kernels(kernels, device, dtype)
        passed_over = [*passed_over, *([slower] if slower else [])]
        compute = Compute(function, implementations, recompute)
        choice = Choice(compute, chosen_attention, chosen_kernels, passed_over)
    except DetourError as error:
        fault = str(error)
    outcomes = _of_all_ranks((fault, choice and (choice.attention, choice.kernels)))
    faults = [told for told, _ in outcomes if told]
    if faults:
        raise DetourError(faults[0])
    offers = sorted({" and ".join(names) for _, names in outcomes})
    if len(offers) > 1:
        raise DetourError(
            f"compute: the ranks' machines offer different things ({'; '.join(offers)}); name compute.attention and "
            "compute.kernels in the run file"
        )
    return choice


def _of_all_ranks(outcome: tuple) -> list[Any]:
    if not dist.is_initialized():
        return [outcome]
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    return outcomes
