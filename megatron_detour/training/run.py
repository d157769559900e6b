"""What one session of a run works with. A run is one session, or several when it was interrupted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_detour.config import RunConfig
from megatron_detour.data.phase_data import PhaseData
from megatron_detour.model.choose import Choice
from megatron_detour.parallel.state import ParallelState
from megatron_detour.parallel.zero import Zero
from megatron_detour.plan import Plan
from megatron_detour.runtime.preemption import Preemption
from megatron_detour.training.initial_model import InitialModel


@dataclass(frozen=True)
class Run:
    """Every rank has its own, and all but `parallel`, `device` and `preemption` say the same on each of them."""

    config: RunConfig
    plan: Plan
    folder: Path
    initial: InitialModel
    data: PhaseData
    parallel: ParallelState
    device: torch.device
    choice: Choice  # of attention and kernels
    zero: Zero  # the model, its gradients and its optimizer
    preemption: Preemption
