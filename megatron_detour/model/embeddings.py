"""Token embeddings and rotary positions. T positions, S of them on this rank, E hidden size."""

from __future__ import annotations

import torch
from torch import nn

from megatron_detour.model.compute import Compute
from megatron_detour.model.families import Family
from megatron_detour.model.norm import LayerNorm
from megatron_detour.parallel.layers import VocabParallelEmbedding
from megatron_detour.parallel.state import ParallelState


class Embeddings(nn.Module):
    def __init__(self, shape: Family, state: ParallelState, compute: Compute, norm_bias: bool = False) -> None:
        super().__init__()
        self.tok_embeddings = VocabParallelEmbedding(shape.vocabulary, shape.hidden, state)
        self.norm = LayerNorm(shape, compute, state, norm_bias)

    def forward(self, ids_T: torch.Tensor) -> torch.Tensor:
        return self.norm(self.tok_embeddings(ids_T))


def rotary_tables(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin, fp32 [T, head_dim / 2], for int64 positions [T] (Su et al., RoFormer, 2021).

    The two halves of a head are rotated, as in transformers.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    # In this order: other rounding of the frequencies rotates position 8,191 by 5e-4 compared with transformers.
    frequencies = 1.0 / theta**exponents
    angles = positions.to(torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()
