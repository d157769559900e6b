"""Training objectives, one per file. Every `Objective` subclass in a module of this package is registered."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from megatron_detour.objectives.base import IGNORE, Corrupted, Corruption, Objective
from megatron_detour.objectives.causal_lm import CausalLM, NextToken
from megatron_detour.objectives.masked_lm import MaskedLM, Masking

__all__ = [
    "IGNORE",
    "KINDS",
    "REFERENCE",
    "CausalLM",
    "Corrupted",
    "Corruption",
    "MaskedLM",
    "Masking",
    "NextToken",
    "Objective",
    "read_objective",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

# The objective that encoders are used with: controls train it, and its validation loss compares runs.
REFERENCE = MaskedLM


def _kinds(cls: type[Objective]) -> dict[str, type[Objective]]:
    return {kind.name: kind for sub in cls.__subclasses__() for kind in (sub, *_kinds(sub).values())}


KINDS = {REFERENCE.name: REFERENCE} | dict(sorted(_kinds(Objective).items()))


def read_objective(phase: dict[str, Any]) -> Objective:
    """Return the objective of a phase of plan.json, which need not be registered here."""
    name = phase["objective"]
    return KINDS[name].from_plan(phase) if name in KINDS else _unknown(name)


def _unknown(name: str) -> Objective:
    return type("Unregistered", (Objective,), {"name": name, "label": name.upper()})()
