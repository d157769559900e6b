"""Peak FLOP/s of GPUs for dense matrix products in bf16 (and fp16), from the vendors' data sheets.

NVIDIA's sheets state most figures with sparsity; these are half of those. Sources: the data sheets of A100,
A30, A40, A10, L4, L40, L40S, H100, H200, H20, GH200, B100/B200/GB200, RTX A6000 and RTX 6000 Ada; the white papers of
GA102 and AD102 for GeForce (sums in fp32); AWS for the A10G; AMD's data sheets of MI300X and MI325X.
"""

from __future__ import annotations

import re

# TFLOP/s for the first pattern that matches the lowercase name.
TERAFLOPS = (
    (r"\bgb200\b", 2500.0),
    (r"\bb200\b", 2250.0),
    (r"\bb100\b", 1750.0),
    (r"\bgh200\b", 989.4),
    (r"\bh200 nvl\b", 835.5),
    (r"\bh200\b", 989.4),
    (r"\bh100 nvl\b", 835.5),
    (r"\bh100 pcie\b", 756.5),
    (r"\bh100\b", 989.4),
    (r"\bh20\b", 148.0),
    (r"\ba100\b", 312.0),
    (r"\ba40\b", 149.7),
    (r"\ba30\b", 165.0),
    (r"\ba10g\b", 70.0),
    (r"\ba10\b", 125.0),
    (r"\bl40s\b", 362.0),
    (r"\bl40\b", 181.0),
    (r"\bl4\b", 121.0),
    (r"\b6000 ada\b", 364.2),
    (r"\ba6000\b", 154.8),
    (r"\brtx 4090\b", 165.2),
    (r"\brtx 3090\b", 71.0),
    (r"\bmi300x\b", 1307.4),
    (r"\bmi325x\b", 1307.4),
)
NAMES = tuple(pattern.replace(r"\b", "") for pattern, _ in TERAFLOPS)
HALF = ("bf16", "bfloat16", "fp16", "float16")


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Return a device's FLOP/s by the name that torch.cuda.get_device_name returns, or a part of it such as "h100".

    None for an unknown device and for a dtype of more than 16 bits.
    """
    if dtype.removeprefix("torch.") not in HALF:
        return None
    name = " ".join(re.split(r"[\s_-]+", device_name.lower()))
    return next((1e12 * peak for pattern, peak in TERAFLOPS if re.search(pattern, name)), None)
