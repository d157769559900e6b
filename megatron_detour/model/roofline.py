"""How fast a GPU could train at best: each operation at the rate of what limits it, one after the other.

Matrix products run at a share of the peak FLOP/s, attention at a smaller one over whole blocks of queries and keys, and
all else at a share of the memory bandwidth. Launches, waits, and communication are not counted, so this is a bound. The
shares are what is published for these GPUs and libraries; this project has not measured them.
"""

from __future__ import annotations

from math import ceil

from megatron_detour.model.families import Family
from megatron_detour.model.families.base import FULL
from megatron_detour.model.flops import BACKWARD, NOTHING_FROZEN, Frozen, training_flops, visible_pairs
from megatron_detour.model.peaks import Chip

PRODUCTS = 0.71  # of the peak that large bf16 products reach: 700 of 989 TFLOP/s on an H100
BANDWIDTH = 0.80  # of the data sheet's
# Shares of the peak that FlashAttention reaches, forward and backward, counting all pairs of the blocks it visits.
ATTENTION = {"flash2": 0.5, "varlen": 0.5, "flash3": 0.45, "flash4": 0.45}
FLASH2_MOST = 260e12  # FLOP/s: it does not use the matrix instructions that are new in Hopper and Blackwell
BLOCK = 128  # queries and keys
# Bytes per parameter. Of a micro-batch: its gradient in bf16, written and read, and the fp32 sum, read and written. Of
# the optimizer's step: gradient, weight and moments in fp32, read and written, and the weight in bf16.
ACCUMULATED, UPDATED = 12, 34


def seconds(
    shape: Family,
    lengths: tuple[int, ...],
    causal: bool,
    labeled: int,
    chip: Chip,
    attention: str = "flash2",
    frozen: Frozen = NOTHING_FROZEN,
    recompute: str = "none",
) -> float:
    """Return the time of a forward and backward pass over packed documents of these lengths, with fused kernels.

    attention: a key of ATTENTION; recompute: as in the run file.
    """
    tokens, visible, visited, again, moved = sum(lengths), 0, 0, 0, 0
    pairs = {kind: _pairs(lengths, causal, None if kind == FULL else shape.window) for kind in set(shape.layer_types)}
    for number, (kind, weights) in enumerate(zip(shape.layer_types, shape.layer_products, strict=True)):
        trained = number >= frozen.below
        repeats = trained and recompute == "full"
        passes = 1 + (BACKWARD + repeats if trained else 0)
        visible += pairs[kind][0] * (1 + BACKWARD * trained)
        visited += pairs[kind][1] * passes
        again += 2 * weights * tokens * repeats
        moved += moved_by_layer(shape) * (passes + (trained and recompute == "selective")) / (1 + BACKWARD)
    per_pair = 4 * shape.hidden  # query-key products and weighted sums of values
    products = training_flops(shape, lengths, causal, labeled, frozen) - per_pair * visible + again
    return (
        products / (PRODUCTS * chip.flops)
        + per_pair * visited / attention_rate(chip, attention)
        + 2 * (tokens * moved + 5 * labeled * shape.vocabulary) / (BANDWIDTH * chip.bandwidth)
    )


def update_seconds(parameters: float, chip: Chip, micro_batches: int = 1, ranks: int = 1) -> float:
    """Return the time per step of summing gradients over micro-batches and of the optimizer on one of `ranks`."""
    moved = parameters * (ACCUMULATED * micro_batches + UPDATED / ranks)
    return moved / (BANDWIDTH * chip.bandwidth)


def attention_rate(chip: Chip, attention: str) -> float:
    """Return the FLOP/s of an attention backend, counting all pairs of the blocks it visits."""
    rate = ATTENTION[attention] * chip.flops
    return min(rate, FLASH2_MOST) if attention in ("flash2", "varlen") else rate


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


def _pairs(lengths: tuple[int, ...], causal: bool, window: int | None) -> tuple[int, int]:
    """Return the visible and the visited pairs of all documents."""
    return tuple(sum(count(n, causal, window) for n in lengths) for count in (visible_pairs, visited_pairs))
