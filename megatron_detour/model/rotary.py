"""Rotary positions, rotating the two halves of a whole head (Su et al., RoFormer, 2021)."""

from __future__ import annotations

import torch


def rotary_tables(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, fp32 [T, head_dim / 2], of int64 positions [T]."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    # In this order: at position 8,191 another rounding of the frequencies turns a head by 5e-4 against transformers.
    frequencies = 1.0 / theta**exponents
    angles = positions.to(torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()
