"""Who sees whom, and the computation of it on packed documents.

T positions of documents one after the other, H heads, D head size. A query sees keys of its own document alone: all of
them, those within `window` on both sides, and under a causal objective only those up to itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

BLOCK = 128  # queries at a time in a local layer: enough to fill a matrix product, few enough to waste little


@dataclass(frozen=True)
class AttentionPattern:
    """`lengths` of the documents (they sum to T), direction, and keys on each side for a local layer.

    A causal local query sees window + 1 keys with its own, as FlashAttention's window (window, 0) does.
    """

    lengths: tuple[int, ...]
    causal: bool
    window: int | None = None


def attention(q_THD: torch.Tensor, k_THD: torch.Tensor, v_THD: torch.Tensor, pattern: AttentionPattern) -> torch.Tensor:
    """softmax(q k / sqrt(D)) v under the pattern, [T, H, D]: one call of SDPA a document, or a block of a long one."""
    outputs = []
    start = 0
    for length in pattern.lengths:
        here = slice(start, start + length)
        outputs += _document(q_THD[here], k_THD[here], v_THD[here], pattern)
        start += length
    return torch.cat(outputs)


def _document(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: AttentionPattern) -> list[torch.Tensor]:
    length, window = len(q), pattern.window
    if window is None or length <= window + 1:
        return [_sdpa(q, k, v, causal=pattern.causal)]
    outputs = []
    for first in range(0, length, BLOCK):
        last = min(first + BLOCK, length)
        keys = slice(max(first - window, 0), last if pattern.causal else min(last + window, length))
        mask = _band(first, last, keys.start, keys.stop, window, pattern.causal, q.device)
        outputs.append(_sdpa(q[first:last], k[keys], v[keys], mask=mask))
    return outputs


def _band(first: int, last: int, key_first: int, key_last: int, window: int, causal: bool, device) -> torch.Tensor:
    distance = torch.arange(first, last, device=device)[:, None] - torch.arange(key_first, key_last, device=device)
    return (distance <= window) & (distance >= (0 if causal else -window))


def _sdpa(q, k, v, mask=None, causal=False) -> torch.Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return out[0].transpose(0, 1)
