"""Prediction head and output layer. L labeled positions, E hidden size."""

from __future__ import annotations

import torch
from torch import nn

from megatron_detour.model.activations import get_activation
from megatron_detour.model.compute import Compute
from megatron_detour.model.families import Family
from megatron_detour.model.norm import LayerNorm
from megatron_detour.parallel.shard import mark_sharded
from megatron_detour.parallel.shard_spec import ShardSpec
from megatron_detour.parallel.state import ParallelState


class PredictionHead(nn.Module):
    def __init__(
        self, shape: Family, compute: Compute, activation: str = "gelu", bias: bool = False, norm_bias: bool = False
    ) -> None:
        super().__init__()
        self.dense = nn.Linear(shape.hidden, shape.hidden, bias=bias)
        self.activation = get_activation(activation)
        self.norm = LayerNorm(shape, compute, bias=norm_bias)

    def forward(self, x_LE: torch.Tensor) -> torch.Tensor:
        return self.norm(self.activation(self.dense(x_LE)))


class OutputBias(nn.Module):
    """The bias of the output layer; its weight is tied to the embedding."""

    def __init__(self, shape: Family, state: ParallelState) -> None:
        super().__init__()
        spec = ShardSpec(dim=0, size=shape.vocabulary)
        self.bias = mark_sharded(nn.Parameter(torch.empty(spec.local(state.tensor_size))), spec)
