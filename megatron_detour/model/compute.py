"""How a model is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.utils.checkpoint import checkpoint

from megatron_detour.kernels.choose import PLAIN, TRACEABLE, Kernels
from megatron_detour.model.attention import Attention, sdpa_attention

# Candidates are not timed: which is fastest differs between sessions, and with it the rounding.
COMPILER = {"backend": "inductor", "options": {"deterministic": True}}
# All layers share a function's compiled forms: for the first layer and others, frozen or not, with gradients or not.
RECOMPILE_LIMIT = 64


@dataclass(frozen=True)
class Compute:
    """How the model is computed; no choice changes what it computes.

    `recompute` says which activations the backward pass recomputes: "none"; "selective", normalized inputs and the
    gated unit's product, which are cheap; "full", everything in a layer except for its inputs.
    `compile` compiles each layer's parts before and after attention with torch.compile.
    """

    attention: Attention = sdpa_attention
    kernels: Kernels = PLAIN
    recompute: str = "none"
    compile: bool = False

    def of_layers(self) -> Compute:
        """Return how layers are computed: a compiler fuses plain kernels itself."""
        return replace(self, kernels=TRACEABLE) if self.compile else self

    def compiled(self, function: Callable) -> Callable:
        """Return the function, compiled once for micro-batches of any size if `compile` is set."""
        if not self.compile:
            return function
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, RECOMPILE_LIMIT)
        return torch.compile(function, dynamic=True, **COMPILER)

    def checkpoint(self, when: str, function, *arguments):
        """Call the function; if `recompute` is `when`, only its arguments are saved for the backward pass."""
        if self.recompute != when:
            return function(*arguments)
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
