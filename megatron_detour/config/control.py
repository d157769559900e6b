"""The equal-compute twin of a run: other objective, all else the same."""

from __future__ import annotations

import dataclasses

from megatron_detour.config.schema import RunConfig
from megatron_detour.errors import DetourError
from megatron_detour.objectives import REFERENCE


def parse_control(text: str) -> float:
    """The mask rate of ``--control mlm=0.30``. Raises DetourError."""
    objective, _, rate = text.partition("=")
    try:
        if objective != "mlm":
            raise ValueError
        return float(rate)
    except ValueError:
        raise DetourError(f"--control {text}: write it as --control or --control mlm=0.30") from None


def as_control(config: RunConfig, mask_rate: float) -> RunConfig:
    """Every phase of a detour becomes MLM at `mask_rate`; data, order and schedule stay.

    It masks whole words where the run file's own phases do.
    """
    if not 0 < mask_rate < 1:
        raise DetourError(f"--control: the mask rate must lie between 0 and 1, it is {mask_rate:g}")
    if not any(phase.objective.detour for phase in config.phases):
        raise DetourError("--control: every phase of the run file trains mlm, so there is nothing to replace")
    masked = REFERENCE(mask_rate, whole_word_masking=config.needs_word_boundaries)
    phases = tuple(
        dataclasses.replace(phase, objective=masked) if phase.objective.detour else phase for phase in config.phases
    )
    return dataclasses.replace(
        config, name=f"{config.name}-control", folder=f"{config.folder.rstrip('/')}-control", phases=phases
    )
