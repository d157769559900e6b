"""The language model of any family: an encoder of packed documents, and the logits of labeled positions.

T positions, E hidden size, L labeled positions, V rows of the vocabulary on this tensor rank. One model serves all
objectives: the direction of attention comes with the micro-batch.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod

import torch
from torch import nn
from torch.nn import functional

from megatron_detour.model.compute import Compute
from megatron_detour.model.families import Family
from megatron_detour.parallel.loss import LossSum, linear_cross_entropy
from megatron_detour.parallel.state import ParallelState


class LanguageModel(nn.Module, ABC):
    """The same parameters for masked and causal language modeling, named as in transformers' checkpoints."""

    def __init__(self, shape: Family, state: ParallelState, compute: Compute | None, z_loss: float) -> None:
        super().__init__()
        self.shape, self.state, self.compute, self.z_loss = shape, state, compute or Compute(), z_loss

    @abstractmethod
    def hidden(
        self, input_ids: torch.Tensor, positions: torch.Tensor, lengths: tuple[int, ...], causal: bool
    ) -> torch.Tensor:
        """Return the hidden states [T, E]. int64 input_ids and positions in their documents [T]."""

    @abstractmethod
    def features(self, hidden_LE: torch.Tensor) -> torch.Tensor:
        """Return what the output layer multiplies, [L, E]."""

    @property
    @abstractmethod
    def output_weight(self) -> torch.Tensor:
        """The output layer's weight [V, E]."""

    @property
    def output_bias(self) -> torch.Tensor:
        """The output layer's bias [V]; zeros if the model has none."""
        return self.output_weight.new_zeros(len(self.output_weight))

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        lengths: tuple[int, ...],
        causal: bool,
        labeled: torch.Tensor,
        labels: torch.Tensor,
    ) -> LossSum:
        """Return the loss sums of a micro-batch. int64 input_ids and positions [T]; labels [L] at `labeled` [L]."""
        hidden_TE = self.hidden(input_ids, positions, lengths, causal)
        return linear_cross_entropy(
            self.features(hidden_TE.index_select(0, labeled)),  # its backward adds rows, without a sort
            self.output_weight,
            self.output_bias,
            labels,
            self.shape.vocabulary,
            self.state,
            self.compute.kernels.softmax_,
            self.z_loss,
        )

    def logits(
        self, input_ids: torch.Tensor, positions: torch.Tensor, lengths: tuple[int, ...], causal: bool = False
    ) -> torch.Tensor:
        """Return logits [T, V] of this tensor rank's vocabulary shard. For checks; training does not need them."""
        features_TE = self.features(self.hidden(input_ids, positions, lengths, causal))
        return functional.linear(features_TE, self.output_weight, self.output_bias)

    def initial_weight(self, name: str, seed: int) -> torch.Tensor:
        """Return a full fp32 parameter of a new model: it depends on seed and name, not on the tensor-parallel size."""
        weight = self.shape.weights[name]
        full = torch.empty(weight.size)
        if not weight.std:
            return full.fill_(weight.fill)
        # torch's CPU generator uses 32 bits of a seed.
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode(), seed))
        return nn.init.trunc_normal_(full, std=weight.std, a=-2 * weight.std, b=2 * weight.std, generator=generator)
