"""The control of a run: another objective on the same tokens, with everything else unchanged."""

from __future__ import annotations

import dataclasses

from megatron_detour.config.schema import RunConfig
from megatron_detour.errors import DetourError
from megatron_detour.objectives import REFERENCE, Objective


def parse_control(text: str) -> float:
    """Return the mask rate of ``--control mlm=0.30``. Raise DetourError."""
    objective, _, rate = text.partition("=")
    try:
        if objective != "mlm":
            raise ValueError
        return float(rate)
    except ValueError:
        raise DetourError(f"--control {text}: write it as --control or --control mlm=0.30") from None


def as_control(config: RunConfig, mask_rate: float) -> RunConfig:
    """Replace the objective of each detour phase by MLM at `mask_rate`; data, order and schedule do not change.

    A phase that masks keeps its other masking keys; one that does not masks whole words if any phase of the run file
    does. Raise DetourError if there is no detour.
    """
    if not 0 < mask_rate < 1:
        raise DetourError(f"--control: the mask rate must be between 0 and 1, not {mask_rate:g}")
    if not any(phase.objective.detour for phase in config.phases):
        raise DetourError("--control: every phase of the run file already trains mlm; run it without --control")
    whole_words = any(getattr(phase.objective, "whole_word_masking", False) for phase in config.phases)
    phases = tuple(
        dataclasses.replace(phase, objective=_masked(phase.objective, mask_rate, whole_words))
        if phase.objective.detour
        else phase
        for phase in config.phases
    )
    return dataclasses.replace(
        config, name=f"{config.name}-control", folder=f"{config.folder.rstrip('/')}-control", phases=phases
    )


def _masked(replaced: Objective, mask_rate: float, whole_words: bool) -> Objective:
    """Return MLM with the keys of the replaced objective that MLM has too."""
    names = [field.name for field in dataclasses.fields(REFERENCE) if hasattr(replaced, field.name)]
    keys = {"whole_word_masking": whole_words} | {name: getattr(replaced, name) for name in names}
    return REFERENCE(**keys | {"mask_rate": mask_rate})
