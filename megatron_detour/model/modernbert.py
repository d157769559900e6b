"""ModernBERT (Warner et al., 2024) on flat, packed microbatches, cut over tensor ranks, under Hugging Face's names.

T positions, E hidden size, H local heads, D head size, I local width of the gated unit, L labelled positions.
One body serves both objectives: the direction of attention comes with the microbatch.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from megatron_detour.model.attention import AttentionPattern, attention
from megatron_detour.model.rotary import rotary_tables, rotate
from megatron_detour.model.shape import FULL, Shape
from megatron_detour.parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron_detour.parallel.loss import linear_cross_entropy
from megatron_detour.parallel.shard import ShardSpec, declare, spec_of
from megatron_detour.parallel.state import ParallelState


@dataclass(frozen=True)
class LossSum:
    """Scalars summed over the labelled positions: the loss in nats, how many labels, how many right arg-maxes."""

    loss: torch.Tensor
    labelled: int
    right: torch.Tensor


class LayerNorm(nn.Module):
    """Layer normalisation with a weight and no bias."""

    def __init__(self, features: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, self.weight.shape, self.weight, None, self.eps)


class Embeddings(nn.Module):
    def __init__(self, shape: Shape, state: ParallelState) -> None:
        super().__init__()
        self.tok_embeddings = VocabParallelEmbedding(shape.vocabulary, shape.hidden, state)
        self.norm = LayerNorm(shape.hidden, shape.norm_eps)

    def forward(self, ids_T: torch.Tensor) -> torch.Tensor:
        return self.norm(self.tok_embeddings(ids_T))


class Attention(nn.Module):
    def __init__(self, shape: Shape, state: ParallelState) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.Wqkv = ColumnParallelLinear(shape.hidden, 3 * shape.hidden, state, parts=3)
        self.Wo = RowParallelLinear(shape.hidden, shape.hidden, state)

    def forward(self, x_TE: torch.Tensor, rotary, pattern: AttentionPattern) -> torch.Tensor:
        qkv = self.Wqkv(x_TE).view(len(x_TE), 3, -1, self.head_dim)
        q_THD, k_THD = rotate(qkv[:, :2], rotary).unbind(1)
        mixed_THD = attention(q_THD, k_THD, qkv[:, 2], pattern)
        return self.Wo(mixed_THD.reshape(len(x_TE), -1))


class GatedUnit(nn.Module):
    """GeGLU (Shazeer, 2020): Wo(gelu(a) * b), a and b the halves of Wi."""

    def __init__(self, shape: Shape, state: ParallelState) -> None:
        super().__init__()
        self.Wi = ColumnParallelLinear(shape.hidden, 2 * shape.intermediate, state, parts=2)
        self.Wo = RowParallelLinear(shape.intermediate, shape.hidden, state)

    def forward(self, x_TE: torch.Tensor) -> torch.Tensor:
        a_TI, b_TI = self.Wi(x_TE).chunk(2, dim=-1)
        return self.Wo(functional.gelu(a_TI) * b_TI)


class Layer(nn.Module):
    def __init__(self, shape: Shape, state: ParallelState, index: int) -> None:
        super().__init__()
        self.attn_norm = LayerNorm(shape.hidden, shape.norm_eps) if index else nn.Identity()  # the embedding's serves
        self.attn = Attention(shape, state)
        self.mlp_norm = LayerNorm(shape.hidden, shape.norm_eps)
        self.mlp = GatedUnit(shape, state)

    def forward(self, x_TE: torch.Tensor, rotary, pattern: AttentionPattern) -> torch.Tensor:
        x_TE = x_TE + self.attn(self.attn_norm(x_TE), rotary, pattern)
        return x_TE + self.mlp(self.mlp_norm(x_TE))


class Encoder(nn.Module):
    """ids and positions [T] -> hidden states [T, E]."""

    def __init__(self, shape: Shape, state: ParallelState) -> None:
        super().__init__()
        self.shape = shape
        self.embeddings = Embeddings(shape, state)
        self.layers = nn.ModuleList(Layer(shape, state, i) for i in range(shape.layers))
        self.final_norm = LayerNorm(shape.hidden, shape.norm_eps)

    def forward(
        self, ids_T: torch.Tensor, positions_T: torch.Tensor, lengths: tuple[int, ...], causal: bool
    ) -> torch.Tensor:
        wide = AttentionPattern(lengths, causal)
        local = AttentionPattern(lengths, causal, self.shape.window)
        rotary_wide = rotary_tables(positions_T, self.shape.head_dim, self.shape.global_theta)
        rotary_local = rotary_tables(positions_T, self.shape.head_dim, self.shape.local_theta)
        x_TE = self.embeddings(ids_T)
        for layer, kind in zip(self.layers, self.shape.layer_types, strict=True):
            x_TE = layer(x_TE, *((rotary_wide, wide) if kind == FULL else (rotary_local, local)))
        return self.final_norm(x_TE)


class PredictionHead(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.dense = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.norm = LayerNorm(shape.hidden, shape.norm_eps)

    def forward(self, x_LE: torch.Tensor) -> torch.Tensor:
        return self.norm(functional.gelu(self.dense(x_LE)))


class Decoder(nn.Module):
    """The bias of the output layer; its weight is the embedding's."""

    def __init__(self, shape: Shape, state: ParallelState) -> None:
        super().__init__()
        spec = ShardSpec(dim=0, size=shape.vocabulary)
        self.bias = declare(nn.Parameter(torch.empty(spec.local(state.tensor_size))), spec)


class ModernBert(nn.Module):
    """The encoder with its head: the same parameters for masked and causal language modelling."""

    def __init__(self, shape: Shape, state: ParallelState) -> None:
        super().__init__()
        self.shape, self.state = shape, state
        self.model = Encoder(shape, state)
        self.head = PredictionHead(shape)
        self.decoder = Decoder(shape, state)

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        positions: torch.Tensor,
        lengths: tuple[int, ...],
        causal: bool,
    ) -> LossSum:
        """The loss of a microbatch: int64 tensors [T], labels below zero where there is none."""
        hidden_TE = self.model(input_ids, positions, lengths, causal)
        labelled = (labels >= 0).nonzero()[:, 0]
        features_LE = self.head(hidden_TE[labelled])
        loss, right = linear_cross_entropy(
            features_LE,
            self.model.embeddings.tok_embeddings.weight,
            self.decoder.bias,
            labels[labelled],
            self.shape.vocabulary,
            self.state,
        )
        return LossSum(loss, len(labelled), right)

    def logits(
        self, input_ids: torch.Tensor, positions: torch.Tensor, lengths: tuple[int, ...], causal: bool = False
    ) -> torch.Tensor:
        """Logits [T, rows]: this tensor rank's slice of the vocabulary. For checks; training never makes them whole."""
        features_TE = self.head(self.model(input_ids, positions, lengths, causal))
        return functional.linear(features_TE, self.model.embeddings.tok_embeddings.weight, self.decoder.bias)

    def initial_weight(self, name: str, seed: int) -> torch.Tensor:
        """A full fp32 parameter of a fresh model: it depends on the seed and the name, not on the tensor-parallel size.

        Truncated normal at 2 sigma, 0.02, and 0.02 / sqrt(2 layers) for output projections; norms 1, bias 0.
        """
        full = torch.empty(self.full_sizes()[name])
        if full.dim() == 1:
            return full.fill_(0.0 if name == "decoder.bias" else 1.0)
        std = self.shape.initializer_range / (math.sqrt(2 * self.shape.layers) if name.endswith("Wo.weight") else 1)
        generator = torch.Generator().manual_seed((seed << 32) | zlib.crc32(name.encode()))
        return nn.init.trunc_normal_(full, std=std, a=-2 * std, b=2 * std, generator=generator)

    def full_sizes(self) -> dict[str, tuple[int, ...]]:
        """The size of every parameter before it was cut, by name."""
        sizes = {}
        for name, parameter in self.named_parameters():
            size, spec = list(parameter.shape), spec_of(parameter)
            if spec is not None:
                size[spec.dim] = spec.size
            sizes[name] = tuple(size)
        return sizes
