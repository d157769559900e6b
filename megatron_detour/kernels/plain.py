"""Plain PyTorch form of every kernel, for any device and dtype: the reference, and what a CPU runs.

T positions, E hidden size, H heads, D head size, I width of the gated unit, V rows of the vocabulary.
"""

from __future__ import annotations

import torch
from torch.nn import functional

SOFTMAX_ROWS = 32  # per block: their fp32 copy stays in a core's cache


def layer_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return the layer normalization of x [T, E], with weight [E] and without bias."""
    return functional.layer_norm(x, weight.shape, weight, None, eps)


def add_layer_norm(
    x: torch.Tensor, change: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the residual stream x + change, in x's dtype, and its layer normalization."""
    x = x + change
    return x, layer_norm(x, weight, eps)


def geglu(ab: torch.Tensor) -> torch.Tensor:
    """Return gelu(a) * b of ab [T, 2 I], with the exact GELU (Shazeer, 2020)."""
    a, b = ab.chunk(2, dim=-1)
    return functional.gelu(a) * b


def rotate_(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate q and k of qkv [T, 3 H D] by their positions, in place; cos and sin: fp32 [T, D / 2]."""
    return _Rotate.apply(qkv, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.mark_dirty(qkv)
        return _turn_(qkv, cos, sin)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        cos, sin = ctx.saved_tensors
        return _turn_(grad.clone(), cos, -sin), None, None


def _turn_(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = qkv.view(len(qkv), 3, -1, 2 * cos.shape[1])[:, :2].chunk(2, dim=-1)
    cos, sin = cos[:, None, None], sin[:, None, None]  # their fp32 makes the products fp32
    turned = first * cos - second * sin
    second.copy_(second * cos + first * sin)
    first.copy_(turned)
    return qkv


def softmax_(logits: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Overwrite logits [n, V] with softmax(logits + bias). Return log-sum-exp and maximum [n] of logits + bias, in fp32
    (fp64 for fp64 logits)."""
    exact = torch.promote_types(logits.dtype, torch.float32)
    bias = bias.to(exact)
    log_sum, greatest = logits.new_empty(2, len(logits), dtype=exact)
    at_once = SOFTMAX_ROWS if logits.device.type == "cpu" else max(len(logits), 1)
    for start in range(0, len(logits), at_once):
        part = slice(start, start + at_once)
        rows = logits[part] + bias
        torch.amax(rows, 1, out=greatest[part])
        probabilities = torch.softmax(rows, 1)
        # The greatest logit's probability is 1 / sum of exp(logit - greatest).
        log_sum[part] = greatest[part] - probabilities.amax(1).log()
        logits[part] = probabilities
    return log_sum, greatest
