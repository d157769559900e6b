"""What one session of a run works with. A run is one session, or several when it was interrupted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_detour.config import RunConfig
from megatron_detour.data.phase_data import PhaseData
from megatron_detour.errors import DetourError
from megatron_detour.model.choose import Choice
from megatron_detour.parallel.state import ParallelState
from megatron_detour.parallel.zero import Zero
from megatron_detour.plan import Plan
from megatron_detour.runtime.preemption import Preemption
from megatron_detour.training.initial_model import InitialModel
from megatron_detour.training.run_directory import stand_in


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


def initial_model(config: RunConfig, folder: Path) -> InitialModel:
    """What the run starts from; once it has a checkpoint, that says the same where the start model is gone."""
    try:
        return InitialModel.of(config)
    except DetourError:
        model = stand_in(folder, config.model)
        if model is None:
            raise
        return InitialModel.of(replace(config, model=model))
