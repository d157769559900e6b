"""Residual sum and layer normalization in one pass over a row; kernels/plain.py has the reference."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

# Of the backward pass: each sums the weight's gradient over its rows into a row of its own. As many as fit at once on a
# GPU of 132 multiprocessors, 8 each: with fewer, too few loads are in flight to hide their latency.
PROGRAMS = 1024


@triton.jit
def _forward(
    x, change, weight, total, normed, means, inverse_deviations, features, eps, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < features
    here = row * features + column
    value = tl.load(x + here, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(change + here, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)  # the backward pass reads this back
        tl.store(total + here, rounded, mask=inside)
        value = rounded.to(tl.float32)
    mean = tl.sum(value, 0) / features
    centered = tl.where(inside, value - mean, 0.0)
    inverse_deviation = 1.0 / tl.sqrt(tl.sum(centered * centered, 0) / features + eps)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + here, (centered * inverse_deviation * scale).to(normed.dtype.element_ty), mask=inside)
    tl.store(means + row, mean)
    tl.store(inverse_deviations + row, inverse_deviation)


@triton.jit
def _backward(
    grad_total,
    grad_normed,
    total,
    weight,
    means,
    inverse_deviations,
    grad_x,
    grad_weights,
    rows,
    features,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < features
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([BLOCK], tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        here = row * features + column  # int32 suffices for a million positions of any width in use
        grad = tl.load(grad_normed + here, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(total + here, mask=inside, other=0.0).to(tl.float32)
        inverse_deviation = tl.load(inverse_deviations + row)
        unit = tl.where(inside, (value - tl.load(means + row)) * inverse_deviation, 0.0)
        scaled = grad * scale
        along_mean = tl.sum(scaled, 0) / features
        along_unit = tl.sum(scaled * unit, 0) / features
        result = (scaled - along_mean - unit * along_unit) * inverse_deviation
        if ADD:
            result += tl.load(grad_total + here, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + here, result.to(grad_x.dtype.element_ty), mask=inside)
        grad_weight += grad * unit
    tl.store(grad_weights + program * features + column, grad_weight, mask=inside)


@triton.jit
def _sum_rows(parts, total, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        sums += tl.load(parts + row * columns + column, mask=(row < rows) & (column < columns), other=0.0)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(total + column, tl.sum(sums, 0).to(total.dtype.element_ty), mask=column < columns)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return _LayerNorm.apply(x, None, weight, eps)


def add_layer_norm(
    x: torch.Tensor, change: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return _LayerNorm.apply(x, change, weight, eps)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, change, weight, eps):
        x = x.contiguous()
        rows, features = x.shape
        normed = torch.empty_like(x)
        total = x if change is None else torch.empty_like(x)
        means, inverse_deviations = torch.empty(2, rows, dtype=torch.float32, device=x.device)
        block = triton.next_power_of_2(features)
        _forward[(rows,)](
            x,
            x if change is None else change.contiguous(),
            weight,
            total,
            normed,
            means,
            inverse_deviations,
            features,
            eps,
            ADD=change is not None,
            BLOCK=block,
            num_warps=_warps(block),
        )
        ctx.save_for_backward(total, weight, means, inverse_deviations)
        ctx.add = change is not None
        return (total, normed) if ctx.add else normed

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        total, weight, means, inverse_deviations = ctx.saved_tensors
        rows, features = total.shape
        grad_normed = grads[-1].contiguous()
        grad_x = torch.empty_like(total)
        programs = min(PROGRAMS, rows)
        grad_weights = torch.empty(programs, features, dtype=torch.float32, device=total.device)
        block = triton.next_power_of_2(features)
        _backward[(programs,)](
            grads[0].contiguous(),
            grad_normed,
            total,
            weight,
            means,
            inverse_deviations,
            grad_x,
            grad_weights,
            rows,
            features,
            ADD=ctx.add,
            BLOCK=block,
            num_warps=_warps(block),
        )
        grad_weight = torch.empty_like(weight)
        _sum_rows[(triton.cdiv(features, 16),)](
            grad_weights, grad_weight, programs, features, ROWS=128, COLUMNS=16, num_warps=8
        )
        return grad_x, grad_x if ctx.add else None, grad_weight, None


def _warps(block: int) -> int:
    return min(max(block // 256, 1), 8)
