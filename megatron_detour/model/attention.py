"""Attention over packed documents.

T positions of concatenated documents, H heads, D head size. A query attends only to keys of its own document: all of
them or those within `window` on either side; under a causal objective only those up to itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional


@dataclass(frozen=True)
class AttentionPattern:
    """`lengths` of the documents (their sum is T), direction, and the number of keys on either side for a local layer.

    A causal local query attends to window + 1 keys, its own included, like FlashAttention's window (window, 0).
    All layers of a kind share one pattern in a forward pass, and the tensors derived from it.
    """

    lengths: tuple[int, ...]
    causal: bool
    window: int | None
    device: torch.device

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        """Start of each document and end of the last one: int32 [documents + 1]."""
        return (
            functional.pad(torch.tensor(self.lengths).cumsum(0), (1, 0))
            .to(torch.int32)
            .to(self.device, non_blocking=True)
        )

    @cached_property
    def longest(self) -> int:
        return max(self.lengths)

    @cached_property
    def documents(self) -> torch.Tensor:
        """Index of the document of each position, int64 [T]."""
        numbers = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))
        return numbers.to(self.device, non_blocking=True)

    @cached_property
    def near(self) -> torch.Tensor:
        """Mask of a local layer within the longest document, bool [longest, longest]; others' are its corners."""
        position = torch.arange(self.longest, device=self.device)
        distance = position[:, None] - position
        near = distance.abs() <= self.window
        return near & (distance >= 0) if self.causal else near

    @cached_property
    def bands(self) -> torch.Tensor:
        """Mask for blocks of `window` queries over the keys of their own and the adjacent blocks.

        bool [blocks, 1, window, 3 window]; 2 window keys if causal, without the following block.
        """
        window = self.window
        query = torch.arange(window, device=self.device)[:, None]
        key = torch.arange(-window, window if self.causal else 2 * window, device=self.device)
        near = (key - query).abs() <= window
        if self.causal:
            near &= key <= query
        # Padding after the last document counts as a document; keys outside the blocks belong to none.
        blocks = _blocks(self.documents, window, fill=-1)
        around = _around(blocks, self.causal, fill=-2)
        return (near & (blocks[:, :, None] == around[:, None, :]))[:, None]

    def visible(self) -> torch.Tensor:
        """Return the full mask, bool [T, T]: for checks only."""
        position = torch.arange(sum(self.lengths), device=self.device)
        distance = position[:, None] - position
        seen = self.documents[:, None] == self.documents
        if self.window is not None:
            seen &= distance.abs() <= self.window
        return seen & (distance >= 0) if self.causal else seen


# q, k, v [T, H, D] -> softmax(q k^T / sqrt(D)) v under the pattern's mask, [T, H, D]
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, AttentionPattern], torch.Tensor]


def sdpa_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: AttentionPattern) -> torch.Tensor:
    """For any device: one SDPA call per document, or for local layers one call for all blocks of `window` queries.

    The cost of a local layer is linear in a document's length. bf16 on a CPU is computed in fp32.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return _InFloat.apply(q, k, v, pattern)
    return _sdpa(q, k, v, pattern)


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: AttentionPattern) -> torch.Tensor:
    """The reference implementation, with all [T, T] scores."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    scores_HTT = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    return (scores_HTT.masked_fill(~pattern.visible(), float("-inf")).softmax(-1) @ v).transpose(0, 1)


class _InFloat(torch.autograd.Function):
    """torch's backward pass of bf16 attention on a CPU is several times slower than that of fp32.

    It is computed from bf16 again, so that no fp32 copies are kept.
    """

    @staticmethod
    def forward(ctx, q, k, v, pattern):
        ctx.save_for_backward(q, k, v)
        ctx.pattern = pattern
        return _sdpa(q.float(), k.float(), v.float(), pattern).to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        leaves = [x.float().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = _sdpa(*leaves, ctx.pattern)
        return *(x.to(grad.dtype) for x in torch.autograd.grad(out, leaves, grad.float())), None


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: AttentionPattern) -> torch.Tensor:
    if pattern.window is None or pattern.longest <= pattern.window + 1:
        return _by_document(q, k, v, pattern)
    # A block's queries are multiplied with 2 or 3 windows of keys. A GPU pays for calls rather than for products.
    if q.device.type == "cpu" and pattern.longest <= (2 if pattern.causal else 3) * pattern.window:
        return _by_document(q, k, v, pattern, pattern.near)
    return _by_block(q, k, v, pattern)


def _by_document(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: AttentionPattern, near: torch.Tensor | None = None
) -> torch.Tensor:
    def attend(*document: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in document)
        mask = None if near is None else near[: q.shape[2], : q.shape[2]]
        causal = pattern.causal and mask is None
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return out[0].transpose(0, 1)

    # Split, not sliced: the gradient of a slice is as large as the full tensor.
    return torch.cat(
        [attend(*document) for document in zip(*(x.split(pattern.lengths) for x in (q, k, v)), strict=True)]
    )


def _by_block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: AttentionPattern) -> torch.Tensor:
    tokens = len(q)
    q, k, v = (_blocks(x, pattern.window) for x in (q, k, v))
    k, v = (_around(x, pattern.causal) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=pattern.bands)
    return out.transpose(1, 2).flatten(0, 1)[:tokens]


def _blocks(x: torch.Tensor, size: int, fill: int = 0) -> torch.Tensor:
    """[T, ...] -> [blocks, size, ...], padded at the end."""
    missing = -len(x) % size
    padded = functional.pad(x, (0, 0) * (x.dim() - 1) + (0, missing), value=fill) if missing else x
    return padded.unflatten(0, (-1, size))


def _around(blocks: torch.Tensor, causal: bool, fill: int = 0) -> torch.Tensor:
    """[blocks, size, ...] -> [blocks, 2 or 3 size, ...]: previous block, block and, unless causal, next block."""
    edge = torch.full_like(blocks[:1], fill)
    before = torch.cat([edge, blocks[:-1]])
    if causal:
        return torch.cat([before, blocks], 1)
    return torch.cat([before, blocks, torch.cat([blocks[1:], edge])], 1)
