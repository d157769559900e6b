"""ModernBERT (Warner et al., 2024) on flat batches of documents, cut over tensor ranks, under Hugging Face's names.

T positions, E hidden size, H local heads, D head size, I local width of the gated unit, L labelled positions.
S positions are T, or this tensor rank's share of them under sequence parallelism.
One body serves both objectives: the direction of attention comes with the microbatch.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from megatron_detour.kernels.choose import PLAIN, Kernels
from megatron_detour.model.attention import Attention, AttentionPattern, sdpa_attention
from megatron_detour.model.rotary import rotary_tables
from megatron_detour.model.shape import FULL, Shape
from megatron_detour.parallel.collectives import gather_from_sequence_parallel, gather_weight
from megatron_detour.parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron_detour.parallel.loss import LossSum, linear_cross_entropy
from megatron_detour.parallel.shard import ShardSpec, mark_sharded, spec_of
from megatron_detour.parallel.state import ParallelState


@dataclass(frozen=True)
class Compute:
    """How it is computed, and not what.

    `recompute` is what the backward pass computes again instead of keeping: "none"; "selective", normalised inputs and
    the gated unit's product, which are cheap; "full", all of a layer but its inputs.
    """

    attention: Attention = sdpa_attention
    kernels: Kernels = PLAIN
    recompute: str = "none"

    def again(self, when: str, function, *arguments):
        """Calls the function; where `recompute` is `when`, nothing but its arguments is kept."""
        if self.recompute != when:
            return function(*arguments)
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


class LayerNorm(nn.Module):
    """Layer normalisation with a weight and no bias; `sharing` tells whether tensor ranks share out the positions."""

    def __init__(self, shape: Shape, compute: Compute, sharing: ParallelState | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape.hidden))
        self.eps, self.kernels, self.sharing = shape.norm_eps, compute.kernels, sharing

    def forward(self, x_SE: torch.Tensor) -> torch.Tensor:
        return self.kernels.layer_norm(x_SE, self._weight(), self.eps)

    def of_sum(self, x_SE: torch.Tensor, change_SE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum, and the sum normalised."""
        return self.kernels.add_layer_norm(x_SE, change_SE, self._weight(), self.eps)

    def _weight(self) -> torch.Tensor:
        return self.weight if self.sharing is None else gather_weight(self.weight, self.sharing)


class Embeddings(nn.Module):
    def __init__(self, shape: Shape, state: ParallelState, compute: Compute) -> None:
        super().__init__()
        self.tok_embeddings = VocabParallelEmbedding(shape.vocabulary, shape.hidden, state)
        self.norm = LayerNorm(shape, compute, state)

    def forward(self, ids_T: torch.Tensor) -> torch.Tensor:
        return self.norm(self.tok_embeddings(ids_T))


class SelfAttention(nn.Module):
    def __init__(self, shape: Shape, state: ParallelState, compute: Compute) -> None:
        super().__init__()
        self.head_dim, self.compute = shape.head_dim, compute
        self.Wqkv = ColumnParallelLinear(shape.hidden, 3 * shape.hidden, state, parts=3)
        self.Wo = RowParallelLinear(shape.hidden, shape.hidden, state)

    def forward(self, qkv: torch.Tensor, rotary, pattern: AttentionPattern) -> torch.Tensor:
        """From the output of Wqkv, [T, 3 H D], to the change of the residual stream."""
        qkv_T3HD = self.compute.kernels.rotate_(qkv, *rotary).view(len(qkv), 3, -1, self.head_dim)
        return self.Wo(self.compute.attention(qkv_T3HD, pattern).flatten(1))


class GatedUnit(nn.Module):
    """GeGLU (Shazeer, 2020): Wo(gelu(a) * b), a and b the halves of Wi."""

    def __init__(self, shape: Shape, state: ParallelState, compute: Compute) -> None:
        super().__init__()
        self.compute = compute
        self.Wi = ColumnParallelLinear(shape.hidden, 2 * shape.intermediate, state, parts=2)
        self.Wo = RowParallelLinear(shape.intermediate, shape.hidden, state)

    def forward(self, ab: torch.Tensor) -> torch.Tensor:
        """From the output of Wi, [T, 2 I], to the change of the residual stream."""
        return self.compute.again("selective", lambda ab: self.Wo(self.compute.kernels.geglu(ab)), ab)


class Layer(nn.Module):
    """Takes and gives the residual stream and what is still to be added to it: sum and norm are one kernel."""

    def __init__(self, shape: Shape, state: ParallelState, compute: Compute, index: int) -> None:
        super().__init__()
        self.compute = compute
        self.attn_norm = LayerNorm(shape, compute, state) if index else nn.Identity()  # the embedding's serves
        self.attn = SelfAttention(shape, state, compute)
        self.mlp_norm = LayerNorm(shape, compute, state)
        self.mlp = GatedUnit(shape, state, compute)

    def forward(
        self, x_SE: torch.Tensor, change_SE: torch.Tensor | None, rotary, pattern: AttentionPattern
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x_SE, qkv = self._enter(self.attn_norm, self.attn.Wqkv, x_SE, change_SE)
        change_SE = self.attn(qkv, rotary, pattern)
        x_SE, ab = self._enter(self.mlp_norm, self.mlp.Wi, x_SE, change_SE)
        return x_SE, self.mlp(ab)

    def _enter(self, norm, linear, x_SE, change_SE) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream with its change, and the linear layer of its norm."""
        if change_SE is None:
            return x_SE, linear(x_SE)
        if self.compute.recompute == "selective":
            x_SE = x_SE + change_SE
            return x_SE, self.compute.again("selective", lambda x: linear(norm(x)), x_SE)
        x_SE, normed_SE = norm.of_sum(x_SE, change_SE)
        return x_SE, linear(normed_SE)


class Encoder(nn.Module):
    """ids and positions [T] -> hidden states [T, E]."""

    def __init__(self, shape: Shape, state: ParallelState, compute: Compute) -> None:
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
            x_SE, change_SE = self.compute.again("full", layer, x_SE, change_SE, rotary, pattern)
        _, normed_SE = self.final_norm.of_sum(x_SE, change_SE)
        return gather_from_sequence_parallel(normed_SE, self.state)


class PredictionHead(nn.Module):
    def __init__(self, shape: Shape, compute: Compute) -> None:
        super().__init__()
        self.dense = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.norm = LayerNorm(shape, compute)

    def forward(self, x_LE: torch.Tensor) -> torch.Tensor:
        return self.norm(functional.gelu(self.dense(x_LE)))


class Decoder(nn.Module):
    """The bias of the output layer; its weight is the embedding's."""

    def __init__(self, shape: Shape, state: ParallelState) -> None:
        super().__init__()
        spec = ShardSpec(dim=0, size=shape.vocabulary)
        self.bias = mark_sharded(nn.Parameter(torch.empty(spec.local(state.tensor_size))), spec)


class ModernBert(nn.Module):
    """The encoder with its head: the same parameters for masked and causal language modelling."""

    def __init__(self, shape: Shape, state: ParallelState, compute: Compute | None = None, z_loss: float = 0.0) -> None:
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
        labelled: torch.Tensor,
        labels: torch.Tensor,
    ) -> LossSum:
        """The loss of a microbatch: int64 input_ids and positions [T]; `labels` [L] of the positions `labelled` [L]."""
        hidden_TE = self.model(input_ids, positions, lengths, causal)
        return linear_cross_entropy(
            self.head(hidden_TE.index_select(0, labelled)),  # its gradient is an addition of rows, not a sort
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
        """Logits [T, V]: this tensor rank's slice of the vocabulary. For checks; training never makes them whole."""
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
