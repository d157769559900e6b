"""How a model is computed."""

from __future__ import annotations

from dataclasses import dataclass

from torch.utils.checkpoint import checkpoint

from megatron_detour.kernels.choose import PLAIN, Kernels
from megatron_detour.model.attention import Attention, sdpa_attention


@dataclass(frozen=True)
class Compute:
    """How the model is computed; no choice changes what it computes.

    `recompute` says which activations the backward pass recomputes: "none"; "selective", normalized inputs and the
    gated unit's product, which are cheap; "full", everything in a layer except for its inputs.
    """

    attention: Attention = sdpa_attention
    kernels: Kernels = PLAIN
    recompute: str = "none"

    def checkpoint(self, when: str, function, *arguments):
        """Call the function; if `recompute` is `when`, only its arguments are saved for the backward pass."""
        if self.recompute != when:
            return function(*arguments)
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
