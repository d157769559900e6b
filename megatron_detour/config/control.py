"""The equal-compute twin of a run: other objective, all else the same."""

from __future__ import annotations

import dataclasses

from megatron_detour.config.schema import RunConfig
from megatron_detour.errors import DetourError


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
    """Every causal phase becomes MLM at `mask_rate`; data, order and schedule stay.

    It masks whole words where the run file's own mlm phases do.
    """
    if not 0 < mask_rate < 1:
        raise DetourError(f"--control: the mask rate must lie between 0 and 1, it is {mask_rate:g}")
    if not any(phase.objective == "clm" for phase in config.phases):
        raise DetourError("--control: the run file has no clm phase, so there is nothing to replace")
    whole_words = any(phase.whole_word_masking for phase in config.phases)
    masked = {"objective": "mlm", "mask_rate": mask_rate, "whole_word_masking": whole_words}
    phases = tuple(
        dataclasses.replace(phase, **masked) if phase.objective == "clm" else phase for phase in config.phases
    )
    return dataclasses.replace(
        config, name=f"{config.name}-control", folder=f"{config.folder.rstrip('/')}-control", phases=phases
    )
