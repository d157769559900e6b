"""Rotary position embeddings: q and k rotated in place in the output of Wqkv, and back in its gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_detour.kernels.plain import Rotate


@triton.jit
def _turn(
    q,
    k,
    v,
    out,
    cos,
    sin,
    row_q,
    row_k,
    row_v,
    heads,
    half,
    SIGN: tl.constexpr,
    COPY: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (pair < half)
    here = head * half * 2 + pair
    c = tl.load(cos + token * half + pair, mask=pair < half, other=0.0)
    s = tl.load(sin + token * half + pair, mask=pair < half, other=0.0) * SIGN
    part = heads * half * 2
    out += token * 3 * part
    _turn_one(q + token * row_q + here, out + here, c, s, half, inside)
    _turn_one(k + token * row_k + here, out + part + here, c, s, half, inside)
    if COPY:
        v += token * row_v
        out += 2 * part
        tl.store(out + here, tl.load(v + here, mask=inside), mask=inside)
        tl.store(out + half + here, tl.load(v + half + here, mask=inside), mask=inside)


@triton.jit
def _turn_one(source, target, c, s, half, inside):
    x = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, (x * c - y * s).to(target.dtype.element_ty), mask=inside)
    tl.store(target + half, (y * c + x * s).to(target.dtype.element_ty), mask=inside)


def rotate_(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if not (qkv.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()):
        raise ValueError("qkv, cos and sin must be contiguous")
    return Rotate.apply(qkv, cos, sin, _launch)


def _launch(sources, target: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> None:
    rows, _, heads, size = target.shape
    q, k, v = (x if x.stride()[1:] == (size, 1) else x.contiguous() for x in sources)
    block = triton.next_power_of_2(heads), triton.next_power_of_2(size // 2)
    _turn[(rows,)](
        q,
        k,
        v,
        target,
        cos,
        sin,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        heads,
        size // 2,
        SIGN=sign,
        COPY=v.data_ptr() != target[:, 2].data_ptr(),
        HEADS=block[0],
        HALF=block[1],
        num_warps=max(min(block[0] * block[1] // 256, 8), 1),  # 8 values a thread: loads of 16 bytes in bf16
    )
