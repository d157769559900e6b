"""What this machine offers and the run file asks for, as the model's Compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_detour.config import RunConfig
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


def choose_compute(config: RunConfig, head_dim: int, device: torch.device, dtype: torch.dtype) -> Choice:
    """Every rank must call it. Raises DetourError when what the run file names is not there or computes something else
    here, or when ranks would compute in different ways."""
    attention, function, passed_over = choose_attention(config.compute.attention, device, dtype, head_dim)
    kernels, implementations, fault = choose_kernels(config.compute.kernels, device, dtype)
    chosen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(chosen, (attention, kernels))
    if len(set(chosen)) > 1:
        raise DetourError(
            f"compute: the ranks' machines offer different things, {' and '.join(sorted(map(str, set(chosen))))}; name "
            "compute.attention and compute.kernels in the run file"
        )
    compute = Compute(function, implementations, config.compute.recompute)
    return Choice(compute, attention, kernels, [*passed_over, *([fault] if fault else [])])


def training_dtype(deepspeed_config: dict[str, Any]) -> torch.dtype:
    """The type that weights and activations have under this DeepSpeed file."""
    return torch.bfloat16 if deepspeed_config.get("bf16", {}).get("enabled") else torch.float32
