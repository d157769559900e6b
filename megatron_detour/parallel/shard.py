"""How a parameter is cut over tensor ranks: declared where it is made, read by loading, saving and the norm.

A fused weight is cut part by part: rank r of n holds the r-th n-th of q, of k and of v, not of their stack. Rows that
do not divide are padded with zeros inside; the padding never leaves this file.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class ShardSpec:
    """Cut dimension 0 or 1 of a parameter of `parts` fused blocks, `size` long in all."""

    dim: int
    size: int
    parts: int = 1

    def local(self, ranks: int) -> int:
        """The length of one rank's shard."""
        return self.parts * self._per_part(ranks)

    def _per_part(self, ranks: int) -> int:
        return -(-(self.size // self.parts) // ranks)


def mark_sharded(parameter: nn.Parameter, spec: ShardSpec) -> nn.Parameter:
    """Marks a parameter as one rank's shard; DeepSpeed's gradient norm leaves out shards without its attribute."""
    parameter.shard = spec
    parameter.tensor_model_parallel = True
    return parameter


def spec_of(parameter: nn.Parameter) -> ShardSpec | None:
    """The declared cut, or None for a parameter that every tensor rank holds whole."""
    return getattr(parameter, "shard", None)


def shard(full: torch.Tensor, spec: ShardSpec | None, rank: int, ranks: int) -> torch.Tensor:
    """One rank's shard of a full tensor."""
    if spec is None or ranks == 1:
        return full
    per_part = spec.local(ranks) // spec.parts
    chunks = []
    for part in full.chunk(spec.parts, spec.dim):
        length = part.shape[spec.dim]
        start = min(rank * per_part, length)
        chunk = part.narrow(spec.dim, start, min(per_part, length - start))
        chunks.append(_padded(chunk, spec.dim, per_part))
    return torch.cat(chunks, spec.dim)


def unshard(shards: list[torch.Tensor], spec: ShardSpec | None) -> torch.Tensor:
    """The full tensor of the shards of all ranks, in rank order."""
    if spec is None or len(shards) == 1:
        return shards[0]
    pieces = [shard.chunk(spec.parts, spec.dim) for shard in shards]
    parts = [torch.cat([piece[i] for piece in pieces], spec.dim) for i in range(spec.parts)]
    length = spec.size // spec.parts
    return torch.cat([part.narrow(spec.dim, 0, length) for part in parts], spec.dim)


def _padded(tensor: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    missing = length - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)
