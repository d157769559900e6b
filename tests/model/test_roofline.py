"""The roofline: figures of an independent count, monotony, and what it adds up."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_detour.model import roofline
from megatron_detour.model.families import PUBLISHED, read_shape
from megatron_detour.model.flops import Frozen, visible_pairs
from megatron_detour.model.peaks import Chip, chip

BASE, LARGE = (read_shape(PUBLISHED[f"answerdotai/ModernBERT-{size}"], size) for size in ("base", "large"))
H100 = chip("NVIDIA H100 80GB HBM3")
TOKENS = 16_384


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 64])
def test_visited_blocks_hold_all_visible_pairs(causal, window):
    for length in (1, 127, 128, 129, 1000, 8192):
        reach = length if window is None else window
        blocks = {
            (query // roofline.BLOCK, key // roofline.BLOCK)
            for query in range(0, length, 32)
            for key in range(0, (query if causal else length - 1) + 1, 32)
            if abs(query - key) <= reach
        }
        visited = roofline.visited_pairs(length, causal, window)
        assert visited >= visible_pairs(length, causal, window)
        assert visited >= len(blocks) * roofline.BLOCK**2


# Tokens per second in thousands by another count of the same work, layer by layer: one micro-batch per step, MLM 30%.
@pytest.mark.parametrize(
    ("shape", "length", "causal", "flash2", "flash3"),
    [
        (BASE, 1024, False, 407, 445),
        (BASE, 1024, True, 364, 390),
        (BASE, 8192, False, 240, 307),
        (BASE, 8192, True, 276, 325),
        (LARGE, 1024, False, 174, 185),
        (LARGE, 8192, False, 116, 141),
    ],
)
def test_the_figures_of_another_count(shape, length, causal, flash2, flash3):
    labeled = TOKENS - TOKENS // length if causal else round(0.3 * TOKENS)
    lengths, update = (length,) * (TOKENS // length), roofline.update_seconds(shape.parameters, H100)
    for attention, expected in (("flash2", flash2), ("flash3", flash3)):
        seconds = roofline.seconds(shape, lengths, causal, labeled, H100, attention) + update
        tolerance = 0.02 if (shape, length, causal) == (BASE, 1024, False) else 0.07
        assert TOKENS / seconds / 1000 == pytest.approx(expected, rel=tolerance)


def seconds(
    shape=BASE, lengths=(1024,) * 8, causal=False, labeled=2458, sheet=H100, attention="flash2", **more
) -> float:
    return roofline.seconds(shape, lengths, causal, labeled, sheet, attention, **more)


def test_more_work_takes_longer_and_faster_chips_less_time():
    once = seconds()
    assert seconds(lengths=(1024,) * 16, labeled=4916) == pytest.approx(2 * once)
    more = [
        seconds(lengths=(1024,) * 9),
        seconds(lengths=(2048,) * 4),  # longer documents, as many tokens
        seconds(labeled=3000),
        seconds(LARGE),
        seconds(recompute="selective"),
        seconds(recompute="full"),
        seconds(sheet=dataclasses.replace(H100, flops=H100.flops / 2)),
        seconds(sheet=dataclasses.replace(H100, bandwidth=H100.bandwidth / 2)),
        seconds(sheet=chip("a100")),
    ]
    less = [
        seconds(causal=True),
        seconds(attention="flash3"),
        seconds(frozen=Frozen(frozenset({3}))),
        seconds(frozen=Frozen(frozenset(range(8)), embeddings=True)),
    ]
    assert max(less) < once < min(more)
    assert seconds(recompute="selective") < seconds(recompute="full")
    assert less[3] < less[2]


def test_no_part_is_faster_than_its_limit():
    """With memory that is never the limit, products and attention stay below the peak, and each limit counts alone."""
    fast = Chip(H100.flops, 1e30)
    flops = 6 * 8192 * sum(BASE.layer_products)
    assert seconds(sheet=fast, labeled=0) > flops / H100.flops
    assert seconds() == pytest.approx(
        seconds(sheet=fast) + seconds(sheet=Chip(1e30, H100.bandwidth), attention="flash3")
    )
    assert roofline.attention_rate(H100, "flash2") == roofline.FLASH2_MOST < roofline.attention_rate(H100, "flash3")
    assert roofline.attention_rate(chip("a100"), "flash2") == pytest.approx(0.5 * 312e12)


def test_an_update_by_hand():
    sheet = Chip(1.0, 1e9 / roofline.BANDWIDTH)
    assert roofline.update_seconds(1e9, sheet) == pytest.approx(46)
    assert roofline.update_seconds(1e9, sheet, micro_batches=3, ranks=2) == pytest.approx(3 * 12 + 17)
