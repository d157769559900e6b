"""ModernBERT: pre-norm layers on packed documents, sharded over tensor ranks.

T positions, E hidden size, L labeled positions. S positions are T, or this tensor rank's part of them under sequence
parallelism.
"""

from __future__ import annotations

import torch
from torch import nn

from megatron_detour.model.attention import AttentionPattern
from megatron_detour.model.compute import Compute
from megatron_detour.model.embeddings import Embeddings, rotary_tables
from megatron_detour.model.families.base import FULL
from megatron_detour.model.families.modernbert import ModernBert
from megatron_detour.model.head import OutputBias, PredictionHead
from megatron_detour.model.language_model import LanguageModel
from megatron_detour.model.norm import LayerNorm
from megatron_detour.model.self_attention import SelfAttention
from megatron_detour.parallel.collectives import gather_from_sequence_parallel
from megatron_detour.parallel.state import ParallelState


class Layer(nn.Module):
    """Takes and returns the residual stream and the change not yet added to it: sum and norm are one kernel."""

    def __init__(self, shape: ModernBert, state: ParallelState, compute: Compute, index: int) -> None:
        super().__init__()
        self.compute = compute = compute.of_layers()
        # The embedding has normalized the first layer's input.
        self.attn_norm = LayerNorm(shape, compute, state, shape.norm_bias) if index else nn.Identity()
        self.attn = SelfAttention(shape, state, compute, shape.attention_bias)
        self.mlp_norm = LayerNorm(shape, compute, state, shape.norm_bias)
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
        self.embeddings = Embeddings(shape, state, compute, shape.norm_bias)
        self.layers = nn.ModuleList(Layer(shape, state, compute, i) for i in range(shape.layers))
        self.final_norm = LayerNorm(shape, compute, state, shape.norm_bias)

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


class ModernBertModel(LanguageModel):
    """Encoder and prediction head."""

    def __init__(self, shape: ModernBert, state: ParallelState, compute: Compute | None, z_loss: float) -> None:
        super().__init__(shape, state, compute, z_loss)
        self.model = Encoder(shape, state, self.compute)
        self.head = PredictionHead(shape, self.compute, shape.head_activation, shape.head_bias, shape.norm_bias)
        if shape.decoder_bias:
            self.decoder = OutputBias(shape, state)

    def hidden(
        self, input_ids: torch.Tensor, positions: torch.Tensor, lengths: tuple[int, ...], causal: bool
    ) -> torch.Tensor:
        return self.model(input_ids, positions, lengths, causal)

    def features(self, hidden_LE: torch.Tensor) -> torch.Tensor:
        return self.head(hidden_LE)

    @property
    def output_weight(self) -> torch.Tensor:
        return self.model.embeddings.tok_embeddings.weight

    @property
    def output_bias(self) -> torch.Tensor:
        return self.decoder.bias if self.shape.decoder_bias else super().output_bias
