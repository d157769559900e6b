"""Floating-point operations of a training step by layer type, window and objective.

Only matrix products count: two operations per multiply-add, backward twice the forward. Attention counts only visible
pairs of query and key; what activation checkpointing recomputes does not count.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_detour.model.families import Family
from megatron_detour.model.families.base import FULL, SLIDING
from megatron_detour.model_parts import layers_of

BACKWARD = 2  # times the forward pass: the gradients of the input and of the weight


@dataclass(frozen=True)
class Frozen:
    """What a phase does not train. `below` is the number of bottom layers that need no backward pass, as they and all
    below them are frozen."""

    layers: frozenset[int] = frozenset()
    embeddings: bool = False
    head: bool = False

    @property
    def below(self) -> int:
        if not self.embeddings:
            return 0
        return next(i for i in range(len(self.layers) + 1) if i not in self.layers)

    @classmethod
    def from_parts(cls, parts: tuple[str, ...]) -> Frozen:
        """Create from the parts that a phase's `freeze` names."""
        layers: set[int] = set()
        for part in parts:
            layers |= set(layers_of(part))
        return cls(frozenset(layers), "embeddings" in parts, "head" in parts)


NOTHING_FROZEN = Frozen()


def training_flops(
    shape: Family, lengths: tuple[int, ...], causal: bool, labeled: int, frozen: Frozen = NOTHING_FROZEN
) -> int:
    """Return the FLOPs of a forward and backward pass over documents of these lengths, of all tensor ranks together.

    `labeled` is the number of labeled positions. A frozen weight needs no gradient; a layer with nothing trainable at
    or below it has no backward pass.
    """
    windows = {FULL: None, SLIDING: shape.window}
    scores = {  # query-key products and weighted sums of values
        kind: sum(visible_pairs(length, causal, windows[kind]) for length in lengths) * 4 * shape.hidden
        for kind in set(shape.layer_types)
    }
    flops = 0
    for number, (kind, weights) in enumerate(zip(shape.layer_types, shape.layer_products, strict=True)):
        products = sum(lengths) * 2 * weights
        flops += products + scores[kind]
        if number >= frozen.below:
            flops += BACKWARD * scores[kind] + (BACKWARD - (number in frozen.layers)) * products
    dense, decoder = labeled * 2 * shape.head_products, labeled * 2 * shape.hidden * shape.vocabulary
    output_frozen = frozen.embeddings if shape.tied else frozen.head
    return flops + (1 + BACKWARD - frozen.head) * dense + (1 + BACKWARD - output_frozen) * decoder


def visible_pairs(length: int, causal: bool, window: int | None) -> int:
    """Return the number of visible pairs of query and key in a document."""
    reach = length - 1 if window is None else min(window, length - 1)
    one_side = reach * (reach + 1) // 2 + (length - 1 - reach) * reach  # keys before the query
    return length + one_side * (1 if causal else 2)
