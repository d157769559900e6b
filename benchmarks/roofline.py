"""How fast a GPU could train at best: each operation at the rate of what limits it, one after the other.

Matrix products run at a share of the peak FLOP/s, attention at a smaller one over whole blocks of queries and keys, and
all else at a share of the memory bandwidth. Launches, waits, and communication are not counted, so this is a bound.
"""

from __future__ import annotations

from math import ceil

from megatron_detour.model.families import Family
from megatron_detour.model.families.base import FULL
from megatron_detour.model.flops import BACKWARD, training_flops, visible_pairs
from megatron_detour.model.peaks import Chip

PRODUCTS = 0.71  # of the peak that large bf16 products reach: 700 of 989 TFLOP/s on an H100
BANDWIDTH = 0.80  # of the data sheet's
# Shares of the peak that FlashAttention reaches, forward and backward, counting all pairs of the blocks it visits.
ATTENTION = {"flash2": 0.26, "varlen": 0.26, "flash3": 0.45, "flash4": 0.45}
BLOCK = 128  # queries and keys


def seconds(
    shape: Family, lengths: tuple[int, ...], causal: bool, labeled: int, chip: Chip, attention: str = "flash2"
) -> float:
    """Return the time of a forward and backward pass over packed documents of these lengths, with fused kernels."""
    windows = {kind: None if kind == FULL else shape.window for kind in shape.layer_types}
    # 4 E per pair: query-key products and weighted sums of values.
    scores, blocks = (
        4 * shape.hidden * sum(count(n, causal, windows[kind]) for kind in shape.layer_types for n in lengths)
        for count in (visible_pairs, visited_pairs)
    )
    products = training_flops(shape, lengths, causal, labeled) - (1 + BACKWARD) * scores
    moved = sum(lengths) * shape.layers * 2 * moved_by_layer(shape) + 5 * 2 * labeled * shape.vocabulary
    return (
        products / (PRODUCTS * chip.flops)
        + (1 + BACKWARD) * blocks / (ATTENTION[attention] * chip.flops)
        + moved / (BANDWIDTH * chip.bandwidth)
    )


def moved_by_layer(shape: Family) -> int:
    """Return the values per position that a layer of ModernBERT reads and writes beside its products."""
    norms, rotary = 2 * 8 * shape.hidden, 2 * 4 * shape.hidden
    attention = 16 * shape.hidden + 4 * shape.hidden  # q, k, v, output and gradients; the fp32 sum of q's gradients
    unit = 8 * shape.intermediate  # forward a and b to a product; backward these and the product's gradient to two
    return norms + rotary + attention + unit


def visited_pairs(length: int, causal: bool, window: int | None) -> int:
    """Return the pairs of query and key in the blocks that hold a visible pair, of a document."""
    count = ceil(length / BLOCK)
    reach = count - 1 if window is None else min(ceil(window / BLOCK), count - 1)
    one_side = reach * (reach + 1) // 2 + (count - 1 - reach) * reach
    return (count + one_side * (1 if causal else 2)) * BLOCK**2
