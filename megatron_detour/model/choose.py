"""Choice of attention backend and kernels for a run; the same on every rank."""

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
    """The Compute of a run, the names of its parts, and why faster ones were skipped."""

    compute: Compute
    attention: str
    kernels: str
    skipped: list[str]

    def __str__(self) -> str:
        chosen = f"attention {self.attention}, kernels {self.kernels}, recompute {self.compute.recompute}"
        return "\n  skipped: ".join([chosen, *self.skipped])


def choose_compute(
    attention: str, kernels: str, recompute: str, head_dim: int, device: torch.device, dtype: torch.dtype
) -> Choice:
    """Choose attention and kernels. Collective over all ranks.

    Raises DetourError on every rank if a requested backend is unavailable or wrong on any rank, or if ranks would use
    different ones.
    """
    choice, fault = None, None
    try:
        chosen_attention, function, skipped = choose_attention(attention, device, dtype, head_dim)
        chosen_kernels, implementations, slower = choose_kernels(kernels, device, dtype)
        skipped = [*skipped, *([slower] if slower else [])]
        compute = Compute(function, implementations, recompute)
        choice = Choice(compute, chosen_attention, chosen_kernels, skipped)
    except DetourError as error:
        fault = str(error)
    outcomes = _gather_from_all_ranks((fault, choice and (choice.attention, choice.kernels)))
    faults = [message for message, _ in outcomes if message]
    if faults:
        raise DetourError(faults[0])
    selected = sorted({" and ".join(names) for _, names in outcomes})
    if len(selected) > 1:
        raise DetourError(
            f"compute: ranks selected different attention or kernel backends ({'; '.join(selected)}); set "
            "compute.attention and compute.kernels in the run file"
        )
    return choice


def _gather_from_all_ranks(outcome: tuple) -> list[Any]:
    if not dist.is_initialized():
        return [outcome]
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    return outcomes
