"""Rotary position embeddings: q and k rotated in place in the output of Wqkv."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable


@triton.jit
def _turn(qkv, cos, sin, heads, half, SIGN: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    which = tl.program_id(1)  # q or k
    head = tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (pair < half)
    first = qkv + (token * 3 + which) * heads * half * 2 + head * half * 2 + pair
    c = tl.load(cos + token * half + pair, mask=pair < half, other=0.0)
    s = tl.load(sin + token * half + pair, mask=pair < half, other=0.0) * SIGN
    x = tl.load(first, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(first + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(first, (x * c - y * s).to(qkv.dtype.element_ty), mask=inside)
    tl.store(first + half, (y * c + x * s).to(qkv.dtype.element_ty), mask=inside)


def rotate_(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return _Rotate.apply(qkv, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.mark_dirty(qkv)
        return _launch(qkv, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        return _launch(grad.clone(memory_format=torch.contiguous_format), *ctx.saved_tensors, -1), None, None


def _launch(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> torch.Tensor:
    if not (qkv.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()):
        raise ValueError("qkv, cos and sin must be contiguous")
    half = cos.shape[1]
    heads = qkv.shape[1] // (6 * half)
    _turn[(len(qkv), 2)](
        qkv,
        cos,
        sin,
        heads,
        half,
        SIGN=sign,
        HEADS=triton.next_power_of_2(heads),
        HALF=triton.next_power_of_2(half),
    )
    return qkv
