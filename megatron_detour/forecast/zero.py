"""The DeepSpeed file as a forecast needs it, and how ZeRO-2 shares out what it holds. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron_detour.config.deepspeed import look_at_deepspeed_config

REDUCE_BUCKET = 500_000_000  # elements; DeepSpeed's default
ALIGNMENT = 2  # elements; a partition starts at a multiple of it


@dataclass(frozen=True)
class Zero2:
    bf16: bool
    reduce_bucket: int = REDUCE_BUCKET  # elements

    @property
    def item_bytes(self) -> int:
        """Of a weight and of an activation."""
        return 2 if self.bf16 else 4

    @classmethod
    def of(cls, raw: dict[str, Any]) -> Zero2:
        bucket = raw["zero_optimization"].get("reduce_bucket_size", REDUCE_BUCKET)
        return cls(bool(raw.get("bf16", {}).get("enabled")), int(bucket))


def faults_of(path: str) -> tuple[Zero2 | None, list[str]]:
    """What a file of ds_configs/ says, or None with every reason why a run refuses it."""
    raw, faults = look_at_deepspeed_config(path)
    return raw and Zero2.of(raw), faults


def partition(groups: tuple[int, ...], data_size: int) -> int:
    """Elements that a rank holds of parameter groups of these sizes: each is filled up and cut into equal parts."""
    unit = ALIGNMENT * data_size
    return sum(math.ceil(group / unit) * unit // data_size for group in groups)
