from __future__ import annotations

from typing import Any

import pytest

from megatron_detour.ui.format import (
    batch_words,
    byte_size,
    compact,
    duration,
    format_lr,
    frozen_words,
    shortened,
)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (950, "950"),
        (12_345, "12.3k"),
        (999_999, "1M"),
        (1_500_000, "1.5M"),
        (100_000_000, "100M"),
        (2e9, "2B"),
        (1.2e12, "1.2T"),
    ],
)
def test_compact(number: float, text: str) -> None:
    assert compact(number) == text


@pytest.mark.parametrize(("count", "text"), [(7, "7 B"), (1024, "1 KiB"), (3_565_158, "3.4 MiB"), (5e13, "45.5 TiB")])
def test_byte_size(count: float, text: str) -> None:
    assert byte_size(count) == text


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        ({"peak": 5e-4, "warmup_tokens": 0, "shape": "constant", "end": 5e-4}, "starts at 0.0005, then constant"),
        (
            {"peak": 2e-5, "warmup_tokens": 2_000_000, "shape": "linear", "end": 0.0},
            "rises to 2e-05 over 2M tokens, then follows a straight line to 0",
        ),
        (
            {"peak": 1e-3, "warmup_tokens": 0, "shape": "odd", "end": 1e-4},
            "starts at 0.001, then follows odd to 0.0001",
        ),
    ],
)
def test_rate_words(rate: dict[str, Any], text: str) -> None:
    assert format_lr(rate) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (250, "4m10s"),
        (7500, "2h05m"),
        (86399.7, "1d00h"),
        (273600, "3d04h"),
        (47.99 * 3600, "1d23h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_words_of_a_batch_and_of_frozen_parts() -> None:
    phase: dict[str, Any] = {"sequences": 576, "sequence_length": 8192, "batch_warmup": None, "freeze": []}
    assert batch_words(phase) == "576 sequences of 8,192 tokens per step"
    warm = {"from": 96, "increment": 96, "tokens": 1_000_000_000}
    assert batch_words({**phase, "batch_warmup": warm}) == (
        "96 to 576 sequences of 8,192 tokens per step, growing over 1B tokens"
    )
    assert frozen_words(phase) == ""
    assert frozen_words({"freeze": ["embeddings", "layers.0-7"]}) == "embeddings, layers 0-7"


def test_shortened_text_keeps_both_ends() -> None:
    assert shortened("abcdefgh", 8) == "abcdefgh"
    assert shortened("abcdefghi", 8) == "abcd…ghi"
