"""Training objectives, one per file. Every `Objective` subclass in a module of this package is registered."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megatron_detour.objectives.base import IGNORE, Corrupted, Corruption, Objective
from megatron_detour.objectives.causal_lm import CausalLM, NextToken
from megatron_detour.objectives.masked_lm import MaskedLM
from megatron_detour.objectives.masking import Masking
from megatron_detour.registry import registry

# The objective that encoders are used with: controls train it, and its validation loss compares runs.
REFERENCE = MaskedLM

KINDS = registry(__name__, Objective, REFERENCE)


def validated(trained: Iterable[Objective] = ()) -> dict[str, type[Objective]]:
    """Return the kinds that a run is validated with: MLM and CLM, by which runs are compared, and what it trains."""
    chosen = {MaskedLM, CausalLM, *map(type, trained)}
    return {name: kind for name, kind in KINDS.items() if kind in chosen}


def read_objective(phase: dict[str, Any]) -> Objective:
    """Return the objective of a phase of plan.json, which need not be registered here."""
    name = phase["objective"]
    return KINDS[name].from_plan(phase) if name in KINDS else _unknown(name)


def _unknown(name: str) -> Objective:
    return type("Unregistered", (Objective,), {"name": name, "label": name.upper()})()
