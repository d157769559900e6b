"""EuroBERT: pre-norm layers with RMSNorm, rotary positions, grouped-query attention and SwiGLU.

T positions, E hidden size, L labeled positions, H local query heads, G local key and value heads, D head size. S
positions are T, or this tensor rank's part of them under sequence parallelism. Modules have the names of transformers'
parameters.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from megatron_detour.kernels.plain import rotated
from megatron_detour.model.attention import AttentionPattern
from megatron_detour.model.compute import Compute
from megatron_detour.model.embeddings import rotary_tables
from megatron_detour.model.families.eurobert import EuroBert
from megatron_detour.model.language_model import LanguageModel
from megatron_detour.model.norm import RMSNorm
from megatron_detour.parallel.collectives import gather_from_sequence_parallel
from megatron_detour.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    column_parallel,
)
from megatron_detour.parallel.shard import mark_sharded
from megatron_detour.parallel.shard_spec import ShardSpec
from megatron_detour.parallel.state import ParallelState


class GroupedAttention(nn.Module):
    """Several query heads share a key and a value head (Ainslie et al., 2023)."""

    def __init__(self, shape: EuroBert, state: ParallelState, compute: Compute) -> None:
        super().__init__()
        self.compute, self.head_dim, self.queries_per_key = compute, shape.head_dim, shape.heads // shape.key_heads
        self.q_proj = ColumnParallelLinear(shape.hidden, shape.hidden, state)
        self.k_proj = ColumnParallelLinear(shape.hidden, shape.key_heads * shape.head_dim, state)
        self.v_proj = ColumnParallelLinear(shape.hidden, shape.key_heads * shape.head_dim, state)
        self.o_proj = RowParallelLinear(shape.hidden, shape.hidden, state)

    def forward(self, x_SE: torch.Tensor, rotary, pattern: AttentionPattern) -> torch.Tensor:
        parts = column_parallel(x_SE, self.q_proj, self.k_proj, self.v_proj)
        q_THD, k_TGD, v_TGD = (part.unflatten(1, (-1, self.head_dim)) for part in parts)
        k_THD, v_THD = (x.repeat_interleave(self.queries_per_key, 1) for x in (rotated(k_TGD, *rotary), v_TGD))
        return self.o_proj(self.compute.attention(rotated(q_THD, *rotary), k_THD, v_THD, pattern).flatten(1))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, 2020)."""

    def __init__(self, shape: EuroBert, state: ParallelState, compute: Compute) -> None:
        super().__init__()
        self.compute = compute
        self.gate_proj = ColumnParallelLinear(shape.hidden, shape.intermediate, state)
        self.up_proj = ColumnParallelLinear(shape.hidden, shape.intermediate, state)
        self.down_proj = RowParallelLinear(shape.intermediate, shape.hidden, state)

    def forward(self, x_SE: torch.Tensor) -> torch.Tensor:
        def product(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
            return self.down_proj(functional.silu(gate) * up)

        return self.compute.checkpoint("selective", product, *column_parallel(x_SE, self.gate_proj, self.up_proj))


class Layer(nn.Module):
    def __init__(self, shape: EuroBert, state: ParallelState, compute: Compute) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape, state)
        self.self_attn = GroupedAttention(shape, state, compute)
        self.post_attention_layernorm = RMSNorm(shape, state)
        self.mlp = SwiGLU(shape, state, compute)

    def forward(self, x_SE: torch.Tensor, rotary, pattern: AttentionPattern) -> torch.Tensor:
        x_SE = x_SE + self.self_attn(self.input_layernorm(x_SE), rotary, pattern)
        return x_SE + self.mlp(self.post_attention_layernorm(x_SE))


class Encoder(nn.Module):
    """ids and positions [T] -> hidden states [T, E]."""

    def __init__(self, shape: EuroBert, state: ParallelState, compute: Compute) -> None:
        super().__init__()
        self.shape, self.state, self.compute = shape, state, compute
        self.embed_tokens = VocabParallelEmbedding(shape.vocabulary, shape.hidden, state)
        self.layers = nn.ModuleList(Layer(shape, state, compute) for _ in range(shape.layers))
        self.norm = RMSNorm(shape, state)

    def forward(
        self, ids_T: torch.Tensor, positions_T: torch.Tensor, lengths: tuple[int, ...], causal: bool
    ) -> torch.Tensor:
        pattern = AttentionPattern(lengths, causal, None, ids_T.device)
        rotary = rotary_tables(positions_T, self.shape.head_dim, self.shape.theta)
        x_SE = self.embed_tokens(ids_T)
        for layer in self.layers:
            x_SE = self.compute.checkpoint("full", layer, x_SE, rotary, pattern)
        return gather_from_sequence_parallel(self.norm(x_SE), self.state)


class OutputLayer(nn.Module):
    """The weight of the output layer, apart from the embedding's."""

    def __init__(self, shape: EuroBert, state: ParallelState) -> None:
        super().__init__()
        spec = ShardSpec(dim=0, size=shape.vocabulary)
        self.weight = mark_sharded(nn.Parameter(torch.empty(spec.local(state.tensor_size), shape.hidden)), spec)


class EuroBertModel(LanguageModel):
    def __init__(self, shape: EuroBert, state: ParallelState, compute: Compute | None, z_loss: float) -> None:
        super().__init__(shape, state, compute, z_loss)
        self.model = Encoder(shape, state, self.compute)
        if not shape.tied:
            self.lm_head = OutputLayer(shape, state)

    def hidden(
        self, input_ids: torch.Tensor, positions: torch.Tensor, lengths: tuple[int, ...], causal: bool
    ) -> torch.Tensor:
        return self.model(input_ids, positions, lengths, causal)

    def features(self, hidden_LE: torch.Tensor) -> torch.Tensor:
        return hidden_LE

    @property
    def output_weight(self) -> torch.Tensor:
        return self.model.embed_tokens.weight if self.shape.tied else self.lm_head.weight
