"""Peak FLOP/s of GPUs for dense matrix products in bf16, and their bandwidth, from the vendors' data sheets.

NVIDIA's sheets state most figures with sparsity; these are half of those. Sources: the data sheets of A100,
A30, A40, A10, L4, L40, L40S, H100, H200, H20, GH200, B100/B200/GB200, RTX A6000 and RTX 6000 Ada; the white papers of
GA102 and AD102 for GeForce (sums in fp32); AWS for the A10G; AMD's data sheets of MI300X and MI325X.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# TFLOP/s and memory bandwidth in TB/s for the first pattern that matches the lowercase name.
SHEETS = (
    (r"\bgb200\b", 2500.0, 8.0),
    (r"\bb200\b", 2250.0, 8.0),
    (r"\bb100\b", 1750.0, 8.0),
    (r"\bgh200\b", 989.4, 4.0),
    (r"\bh200 nvl\b", 835.5, 4.8),
    (r"\bh200\b", 989.4, 4.8),
    (r"\bh100 nvl\b", 835.5, 3.9),
    (r"\bh100 pcie\b", 756.5, 2.0),
    (r"\bh100\b", 989.4, 3.35),
    (r"\bh20\b", 148.0, 4.0),
    (r"\ba100\b", 312.0, 2.0),
    (r"\ba40\b", 149.7, 0.696),
    (r"\ba30\b", 165.0, 0.933),
    (r"\ba10g\b", 70.0, 0.6),
    (r"\ba10\b", 125.0, 0.6),
    (r"\bl40s\b", 362.0, 0.864),
    (r"\bl40\b", 181.0, 0.864),
    (r"\bl4\b", 121.0, 0.3),
    (r"\b6000 ada\b", 364.2, 0.96),
    (r"\ba6000\b", 154.8, 0.768),
    (r"\brtx 4090\b", 165.2, 1.008),
    (r"\brtx 3090\b", 71.0, 0.936),
    (r"\bmi300x\b", 1307.4, 5.3),
    (r"\bmi325x\b", 1307.4, 6.0),
)
NAMES = tuple(pattern.replace(r"\b", "") for pattern, *_ in SHEETS)


@dataclass(frozen=True)
class Chip:
    """A GPU's data sheet."""

    flops: float  # dense bf16 FLOP/s
    bandwidth: float  # bytes per second


def chip(device_name: str) -> Chip | None:
    """Find a device by the name that torch.cuda.get_device_name returns, or a part of it such as "h100"."""
    name = " ".join(re.split(r"[\s_-]+", device_name.lower()))
    sheets = (Chip(1e12 * flops, 1e12 * bandwidth) for pattern, flops, bandwidth in SHEETS if re.search(pattern, name))
    return next(sheets, None)


def peak_flops(device_name: str, bf16: bool) -> float | None:
    """Return a device's FLOP/s; None for an unknown device and for fp32."""
    found = chip(device_name)
    return found.flops if found and bf16 else None
