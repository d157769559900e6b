"""Floating-point operations of a training step, counted by kind of layer, window and objective.

Matrix products alone, two operations a multiplication and addition, backward twice the forward. Attention counts the
pairs of query and key that see each other and no others; what activation checkpointing computes again does not count.
"""

from __future__ import annotations

from megatron_detour.model.shape import FULL, Shape

BACKWARD = 2  # times the forward pass: the gradients by the input and by the weight


def training_flops(shape: Shape, lengths: tuple[int, ...], causal: bool, labelled: int) -> int:
    """Of a forward and backward pass over documents of these lengths with `labelled` positions, all tensor ranks."""
    tokens = sum(lengths)
    forward = tokens * shape.layers * 2 * _layer_weights(shape)
    for kind in set(shape.layer_types):
        pairs = sum(visible_pairs(length, causal, None if kind == FULL else shape.window) for length in lengths)
        forward += shape.layer_types.count(kind) * pairs * 4 * shape.hidden  # scores and their sum of values
    forward += labelled * 2 * (shape.hidden**2 + shape.hidden * shape.vocabulary)
    return (1 + BACKWARD) * forward


def visible_pairs(length: int, causal: bool, window: int | None) -> int:
    """How many pairs of query and key see each other in a document."""
    reach = length - 1 if window is None else min(window, length - 1)
    one_side = reach * (reach + 1) // 2 + (length - 1 - reach) * reach  # keys before the query
    return length + one_side * (1 if causal else 2)


def _layer_weights(shape: Shape) -> int:
    attention = 4 * shape.hidden**2
    gated_unit = 3 * shape.hidden * shape.intermediate
    return attention + gated_unit
