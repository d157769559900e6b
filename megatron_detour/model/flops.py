"""Floating-point operations of a training step, counted by kind of layer, window and objective.

Matrix products alone, two operations a multiplication and addition, backward twice the forward. Attention counts the
pairs of query and key that see each other and no others; what activation checkpointing computes again does not count.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_detour.model.shape import FULL, SLIDING, Shape
from megatron_detour.model_parts import layers_of

BACKWARD = 2  # times the forward pass: the gradients by the input and by the weight


@dataclass(frozen=True)
class Frozen:
    """What a phase does not train. `below` counts the layers at the bottom that nothing trainable is under: they need
    no backward pass at all."""

    layers: frozenset[int] = frozenset()
    embeddings: bool = False
    head: bool = False

    @property
    def below(self) -> int:
        if not self.embeddings:
            return 0
        return next(i for i in range(len(self.layers) + 1) if i not in self.layers)

    @classmethod
    def of(cls, parts: tuple[str, ...]) -> Frozen:
        """Of the parts that a phase's `freeze` names."""
        layers: set[int] = set()
        for part in parts:
            layers |= set(layers_of(part))
        return cls(frozenset(layers), "embeddings" in parts, "head" in parts)


NOTHING_FROZEN = Frozen()


def training_flops(
    shape: Shape, lengths: tuple[int, ...], causal: bool, labelled: int, frozen: Frozen = NOTHING_FROZEN
) -> int:
    """Of a forward and backward pass over documents of these lengths with `labelled` positions, all tensor ranks.

    A frozen weight needs no gradient of its own; a layer with nothing trainable under it has no backward pass.
    """
    products = sum(lengths) * 2 * _layer_weights(shape)
    windows = {FULL: None, SLIDING: shape.window}
    scores = {  # and their sums of values
        kind: sum(visible_pairs(length, causal, windows[kind]) for length in lengths) * 4 * shape.hidden
        for kind in set(shape.layer_types)
    }
    flops = 0
    for number, kind in enumerate(shape.layer_types):
        flops += products + scores[kind]
        if number >= frozen.below:
            flops += BACKWARD * scores[kind] + (BACKWARD - (number in frozen.layers)) * products
    dense, decoder = labelled * 2 * shape.hidden**2, labelled * 2 * shape.hidden * shape.vocabulary
    # The embeddings are the decoder's weight too.
    return flops + (1 + BACKWARD - frozen.head) * dense + (1 + BACKWARD - frozen.embeddings) * decoder


def visible_pairs(length: int, causal: bool, window: int | None) -> int:
    """How many pairs of query and key see each other in a document."""
    reach = length - 1 if window is None else min(window, length - 1)
    one_side = reach * (reach + 1) // 2 + (length - 1 - reach) * reach  # keys before the query
    return length + one_side * (1 if causal else 2)


def _layer_weights(shape: Shape) -> int:
    attention = 4 * shape.hidden**2
    gated_unit = 3 * shape.hidden * shape.intermediate
    return attention + gated_unit
