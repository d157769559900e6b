"""What attention backends and kernels require, for plans, which do not import torch. None: not known yet."""

from __future__ import annotations


def attention_fault(name: str, gpu: bool | None, half: bool | None) -> str | None:
    """Return why an attention backend cannot be used with or without a GPU, in half precision or not."""
    if name in ("auto", "sdpa") or (gpu is not False and half is not False):
        return None
    return f"compute.attention: {name} requires a GPU and bf16; use auto or sdpa"


def kernels_fault(name: str, gpu: bool | None) -> str | None:
    """Return why kernels cannot be used with or without a GPU."""
    if name in ("auto", "plain") or gpu is not False:
        return None
    return f"compute.kernels: {name} requires a GPU; use auto or plain"
