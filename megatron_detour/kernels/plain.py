"""Plain PyTorch form of every kernel, for any device and dtype: the reference, and what a CPU runs.

T positions, E hidden size, H heads, D head size, I width of the gated unit, V rows of the vocabulary.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable
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


def rotate_(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rotate q and k in qkv [T, 3 H D] by their positions, in place; cos and sin: fp32 [T, D / 2].

    Return q, k and v [T, H, D], views of qkv.
    """
    return Rotate.apply(qkv, cos, sin, _turn)


def rotate(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return what `rotate_` returns, as new tensors: torch.compile cannot follow the storage of tensors.

    v too, as a view of it would keep all of qkv for the backward pass.
    """
    q, k, v = qkv.view(len(qkv), 3, -1, 2 * cos.shape[1]).unbind(1)
    return rotated(q, cos, sin), rotated(k, cos, sin), v.contiguous()


class Rotate(torch.autograd.Function):
    """`turn(sources, target, cos, sin, sign)` rotates q and k of three tensors [T, H, D] by sign times their angles,
    and writes all three into target [T, 3, H, D]; the sources may be its views.

    The gradients are gathered and rotated back in one pass; in place if they already are views of one tensor.
    """

    @staticmethod
    def forward(ctx, qkv, cos, sin, turn):
        ctx.save_for_backward(cos, sin)
        ctx.turn = turn
        target = qkv.detach().view(len(qkv), 3, -1, 2 * cos.shape[1])
        turn(target.unbind(1), target, cos, sin, 1)
        return target.unbind(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        target = joined(*grads)
        if target is None:
            rows, heads, size = grads[0].shape
            target = grads[0].new_empty(rows, 3, heads, size)
        ctx.turn(grads, target, *ctx.saved_tensors, -1)
        return target.flatten(1), None, None, None


def joined(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor | None:
    """Return the tensor [T, 3, H, D] whose parts q, k and v [T, H, D] are, or None if they are not of one tensor."""
    rows, heads, size = q.shape
    part = heads * size
    places = [(x.untyped_storage().data_ptr(), x.storage_offset(), x.stride()) for x in (q, k, v)]
    (storage, start, _), *_ = places
    if places != [(storage, start + i * part, (3 * part, size, 1)) for i in range(3)]:
        return None
    return q.as_strided((rows, 3, heads, size), (3 * part, part, size, 1))


def _turn(sources, target: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> None:
    for source, turned in zip(sources[:2], target.unbind(1), strict=False):
        for half, place in zip(_halves(source, cos, sign * sin), turned.chunk(2, dim=-1), strict=True):
            place.copy_(half)
    if sources[2].data_ptr() != target[:, 2].data_ptr():
        target[:, 2] = sources[2]


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return x [T, H, D] rotated by cos and sin, fp32 [T, D / 2], as a new tensor."""
    return torch.cat(_halves(x, cos, sin), -1).to(x.dtype)


def _halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos[:, None], sin[:, None]  # their fp32 makes the products fp32
    first, second = x.chunk(2, dim=-1)
    return first * cos - second * sin, second * cos + first * sin


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
