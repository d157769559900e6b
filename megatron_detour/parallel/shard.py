"""How a parameter is sharded over tensor ranks: declared at its creation, read by loading, saving and gradient norm.

Each part of a fused weight is sharded: rank r of n holds the r-th of n blocks of q, of k and of v, not of their stack.
Rows that do not divide evenly are padded with zeros: of two parts [a; b] of 5 rows each, rank 0 of 2 holds
[a0 a1 a2 b0 b1 b2] and rank 1 [a3 a4 0 b3 b4 0]. `unshard` removes the padding.
"""

from __future__ import annotations

import torch
from torch import nn

from megatron_detour.parallel.shard_spec import ShardSpec


def mark_sharded(parameter: nn.Parameter, spec: ShardSpec) -> nn.Parameter:
    """Mark a parameter as one rank's shard."""
    parameter.shard = spec
    return parameter


def spec_of(parameter: nn.Parameter) -> ShardSpec | None:
    """The declared cut, or None for a parameter that every tensor rank holds whole."""
    return getattr(parameter, "shard", None)


def shard(full: torch.Tensor, spec: ShardSpec | None, rank: int, ranks: int) -> torch.Tensor:
    """Return one rank's shard of a full tensor."""
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
    """Return the full tensor from the shards of all ranks in rank order."""
    if spec is None or len(shards) == 1:
        return shards[0]
    by_rank = [shard.chunk(spec.parts, spec.dim) for shard in shards]
    parts = [torch.cat([blocks[i] for blocks in by_rank], spec.dim) for i in range(spec.parts)]
    length = spec.size // spec.parts
    return torch.cat([part.narrow(spec.dim, 0, length) for part in parts], spec.dim)


def _padded(tensor: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    missing = length - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)
