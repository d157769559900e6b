"""The state of one session of a run. An interrupted run has several sessions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_detour.config import RunConfig
from megatron_detour.data.phase_data import PhaseData
from megatron_detour.forecast.micro_batches import MicroBatch
from megatron_detour.model.choose import Choice
from megatron_detour.parallel.state import ParallelState
from megatron_detour.parallel.zero import Zero
from megatron_detour.plan import Plan
from megatron_detour.runtime.preemption import Preemption
from megatron_detour.training.initial_model import InitialModel


@dataclass(frozen=True)
class Run:
    """Created by each rank; only `parallel`, `device` and `preemption` differ between ranks."""

    config: RunConfig
    plan: Plan  # with the sizes of micro-batches chosen
    folder: Path
    initial: InitialModel
    data: PhaseData
    parallel: ParallelState
    device: torch.device
    micro_batches: dict[str, MicroBatch]  # by phase
    choice: Choice  # of attention and kernels
    zero: Zero  # the model, its gradients and its optimizer
    preemption: Preemption
