"""Rotary positions, rotating the two halves of a whole head (Su et al., RoFormer, 2021)."""

from __future__ import annotations

import torch


def rotary_tables(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, fp32 [T, 1, 1, head_dim / 2], of int64 positions [T]."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    # In this order: at position 8,191 another rounding of the frequencies turns a head by 5e-4 against transformers.
    frequencies = 1.0 / theta**exponents
    angles = positions.to(torch.float32)[:, None] * frequencies
    return angles.cos()[:, None, None], angles.sin()[:, None, None]


def rotate(x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """x [T, m, heads, head_dim] turned by its positions, in fp32 (or fp64) and back in x's type."""
    cos, sin = tables
    first, second = (half.to(torch.promote_types(x.dtype, torch.float32)) for half in x.chunk(2, dim=-1))
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
