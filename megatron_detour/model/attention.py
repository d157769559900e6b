"""Attention over packed documents.

T positions of concatenated documents, H heads, D head size. A query attends only to keys of its own document: all of
them or those within `window` on either side; under a causal objective only those up to itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
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

    The cost of a local layer is linear in a document's length.
    """
    if pattern.window is None or pattern.longest <= pattern.window + 1:
        return _by_document(q, k, v, pattern)
    return _by_block(q, k, v, pattern)


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: AttentionPattern) -> torch.Tensor:
    """The reference implementation, with all [T, T] scores."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    scores_HTT = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    return (scores_HTT.masked_fill(~pattern.visible(), float("-inf")).softmax(-1) @ v).transpose(0, 1)


def _by_document(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: AttentionPattern) -> torch.Tensor:
    # Split, not sliced: the gradient of a slice is as large as the full tensor.
    documents = zip(*(x.split(pattern.lengths) for x in (q, k, v)), strict=True)
    return torch.cat([_sdpa(*document, causal=pattern.causal) for document in documents])


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=causal)[0].transpose(0, 1)


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
