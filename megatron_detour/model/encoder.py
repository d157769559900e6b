"""An encoder of pre-norm layers on packed documents, sharded over tensor ranks, and its language model.

T positions, E hidden size, L labeled positions. S positions are T, or this tensor rank's part of them under sequence
parallelism. One model serves all objectives: the direction of attention comes with the micro-batch.
"""

from __future__ import annotations

import zlib

import torch
from torch import nn
from torch.nn import functional

from megatron_detour.model.attention import AttentionPattern
from megatron_detour.model.compute import Compute
from megatron_detour.model.embeddings import Embeddings, rotary_tables
from megatron_detour.model.families.base import FULL
from megatron_detour.model.families.modernbert import ModernBert
from megatron_detour.model.head import Decoder, PredictionHead
from megatron_detour.model.norm import LayerNorm
from megatron_detour.model.self_attention import SelfAttention
from megatron_detour.parallel.collectives import gather_from_sequence_parallel
from megatron_detour.parallel.loss import LossSum, linear_cross_entropy
from megatron_detour.parallel.state import ParallelState


class Layer(nn.Module):
    """Takes and returns the residual stream and the change not yet added to it: sum and norm are one kernel."""

    def __init__(self, shape: ModernBert, state: ParallelState, compute: Compute, index: int) -> None:
        super().__init__()
        self.compute = compute = compute.of_layers()
        self.attn_norm = LayerNorm(shape, compute, state) if index else nn.Identity()  # the embedding has normalized it
        self.attn = SelfAttention(shape, state, compute)
        self.mlp_norm = LayerNorm(shape, compute, state)
        self.mlp = shape.feed_forward(state, compute)
        # What differs between micro-batches, their documents, is outside of what is compiled.
        self.before, self.after = (compute.compiled(part) for part in (Layer._before, Layer._after))

    def forward(
        self, x_SE: torch.Tensor, change_SE: torch.Tensor | None, rotary, pattern: AttentionPattern
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x_SE, q_THD, k_THD, v_THD = self.before(self, x_SE, change_SE, rotary)
        return self.after(self, x_SE, self.compute.attention(q_THD, k_THD, v_THD, pattern))

    def _before(self, x_SE: torch.Tensor, change_SE: torch.Tensor | None, rotary) -> tuple[torch.Tensor, ...]:
        x_SE, qkv = self._enter(self.attn_norm, self.attn.Wqkv, x_SE, change_SE)
        return x_SE, *self.attn.heads(qkv, rotary)

    def _after(self, x_SE: torch.Tensor, attended_THD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x_SE, ab = self._enter(self.mlp_norm, self.mlp.Wi, x_SE, self.attn.output(attended_THD))
        return x_SE, self.mlp(ab)

    def _enter(self, norm, linear, x_SE, change_SE) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the residual stream with its change added, and the linear layer of its normalization."""
        if change_SE is None:
            return x_SE, linear(x_SE)
        if self.compute.recompute == "selective":
            x_SE = x_SE + change_SE
            return x_SE, self.compute.checkpoint("selective", lambda x: linear(norm(x)), x_SE)
        x_SE, normed_SE = norm.add(x_SE, change_SE)
        return x_SE, linear(normed_SE)


class Encoder(nn.Module):
    """ids and positions [T] -> hidden states [T, E]."""

    def __init__(self, shape: ModernBert, state: ParallelState, compute: Compute) -> None:
        super().__init__()
        self.shape, self.state, self.compute = shape, state, compute
        self.embeddings = Embeddings(shape, state, compute)
        self.layers = nn.ModuleList(Layer(shape, state, compute, i) for i in range(shape.layers))
        self.final_norm = LayerNorm(shape, compute, state)

    def forward(
        self, ids_T: torch.Tensor, positions_T: torch.Tensor, lengths: tuple[int, ...], causal: bool
    ) -> torch.Tensor:
        wide = AttentionPattern(lengths, causal, None, ids_T.device)
        local = AttentionPattern(lengths, causal, self.shape.window, ids_T.device)
        rotary_wide = rotary_tables(positions_T, self.shape.head_dim, self.shape.global_theta)
        rotary_local = rotary_tables(positions_T, self.shape.head_dim, self.shape.local_theta)
        x_SE, change_SE = self.embeddings(ids_T), None
        for layer, kind in zip(self.layers, self.shape.layer_types, strict=True):
            rotary, pattern = (rotary_wide, wide) if kind == FULL else (rotary_local, local)
            x_SE, change_SE = self.compute.checkpoint("full", layer, x_SE, change_SE, rotary, pattern)
        _, normed_SE = self.final_norm.add(x_SE, change_SE)
        return gather_from_sequence_parallel(normed_SE, self.state)


class LanguageModel(nn.Module):
    """Encoder and prediction head: the same parameters for masked and causal language modeling."""

    def __init__(self, shape: ModernBert, state: ParallelState, compute: Compute | None, z_loss: float) -> None:
        super().__init__()
        self.shape, self.state, self.compute, self.z_loss = shape, state, compute or Compute(), z_loss
        self.model = Encoder(shape, state, self.compute)
        self.head = PredictionHead(shape, self.compute)
        self.decoder = Decoder(shape, state)

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
        hidden_TE = self.model(input_ids, positions, lengths, causal)
        return linear_cross_entropy(
            self.head(hidden_TE.index_select(0, labeled)),  # its backward adds rows, without a sort
            self.model.embeddings.tok_embeddings.weight,
            self.decoder.bias,
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
        features_TE = self.head(self.model(input_ids, positions, lengths, causal))
        return functional.linear(features_TE, self.model.embeddings.tok_embeddings.weight, self.decoder.bias)

    def initial_weight(self, name: str, seed: int) -> torch.Tensor:
        """Return a full fp32 parameter of a new model: it depends on seed and name, not on the tensor-parallel size."""
        weight = self.shape.weights[name]
        full = torch.empty(weight.size)
        if not weight.std:
            return full.fill_(weight.fill)
        # torch's CPU generator uses 32 bits of a seed.
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode(), seed))
        return nn.init.trunc_normal_(full, std=weight.std, a=-2 * weight.std, b=2 * weight.std, generator=generator)
