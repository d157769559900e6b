"""ModernBERT (Warner et al., 2024) on packed documents, sharded over tensor ranks, with Hugging Face's parameter names.

T positions, E hidden size, H local heads, D head size, I local width of the gated unit, L labeled positions.
S positions are T, or this tensor rank's part of them under sequence parallelism.
One model serves all objectives: the direction of attention comes with the micro-batch.
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
from megatron_detour.model.shape import FULL, Shape
from megatron_detour.parallel.collectives import gather_from_sequence_parallel, replicated_weight
from megatron_detour.parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron_detour.parallel.loss import LossSum, linear_cross_entropy
from megatron_detour.parallel.shard import ShardSpec, mark_sharded, spec_of
from megatron_detour.parallel.state import ParallelState


@dataclass(frozen=True)
class Compute:
    """How the model is computed; no choice changes what it computes.

    `recompute` says which activations the backward pass recomputes: "none"; "selective", normalized inputs and the
    gated unit's product, which are cheap; "full", everything in a layer except for its inputs.
    """

    attention: Attention = sdpa_attention
    kernels: Kernels = PLAIN
    recompute: str = "none"

    def checkpoint(self, when: str, function, *arguments):
        """Call the function; if `recompute` is `when`, only its arguments are saved for the backward pass."""
        if self.recompute != when:
            return function(*arguments)
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def rotary_tables(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin, fp32 [T, head_dim / 2], for int64 positions [T] (Su et al., RoFormer, 2021).

    The two halves of a head are rotated, as in transformers.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    # In this order: other rounding of the frequencies rotates position 8,191 by 5e-4 compared with transformers.
    frequencies = 1.0 / theta**exponents
    angles = positions.to(torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


class LayerNorm(nn.Module):
    """Layer normalization with a weight and no bias; with `state` it may run in the sequence-parallel region."""

    def __init__(self, shape: Shape, compute: Compute, state: ParallelState | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape.hidden))
        self.eps, self.kernels, self.state = shape.norm_eps, compute.kernels, state

    def forward(self, x_SE: torch.Tensor) -> torch.Tensor:
        return self.kernels.layer_norm(x_SE, self._weight(), self.eps)

    def add(self, x_SE: torch.Tensor, change_SE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum and its normalization."""
        return self.kernels.add_layer_norm(x_SE, change_SE, self._weight(), self.eps)

    def _weight(self) -> torch.Tensor:
        return self.weight if self.state is None else replicated_weight(self.weight, self.state)


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
        self.compute = compute
        self.Wqkv = ColumnParallelLinear(shape.hidden, 3 * shape.hidden, state, parts=3)
        self.Wo = RowParallelLinear(shape.hidden, shape.hidden, state)

    def forward(self, qkv: torch.Tensor, rotary, pattern: AttentionPattern) -> torch.Tensor:
        """Output of Wqkv [T, 3 H D] -> change of the residual stream [S, E]."""
        q_THD, k_THD, v_THD = self.compute.kernels.rotate_(qkv, *rotary)
        return self.Wo(self.compute.attention(q_THD, k_THD, v_THD, pattern).flatten(1))


class GatedUnit(nn.Module):
    """GeGLU (Shazeer, 2020): Wo(gelu(a) * b), a and b the halves of Wi."""

    def __init__(self, shape: Shape, state: ParallelState, compute: Compute) -> None:
        super().__init__()
        self.compute = compute
        self.Wi = ColumnParallelLinear(shape.hidden, 2 * shape.intermediate, state, parts=2)
        self.Wo = RowParallelLinear(shape.intermediate, shape.hidden, state)

    def forward(self, ab: torch.Tensor) -> torch.Tensor:
        """Output of Wi [T, 2 I] -> change of the residual stream [S, E]."""
        return self.compute.checkpoint("selective", lambda ab: self.Wo(self.compute.kernels.geglu(ab)), ab)


class Layer(nn.Module):
    """Takes and returns the residual stream and the change not yet added to it: sum and norm are one kernel."""

    def __init__(self, shape: Shape, state: ParallelState, compute: Compute, index: int) -> None:
        super().__init__()
        self.compute = compute
        self.attn_norm = LayerNorm(shape, compute, state) if index else nn.Identity()  # the embedding has normalized it
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
            x_SE, change_SE = self.compute.checkpoint("full", layer, x_SE, change_SE, rotary, pattern)
        _, normed_SE = self.final_norm.add(x_SE, change_SE)
        return gather_from_sequence_parallel(normed_SE, self.state)


class PredictionHead(nn.Module):
    def __init__(self, shape: Shape, compute: Compute) -> None:
        super().__init__()
        self.dense = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.norm = LayerNorm(shape, compute)

    def forward(self, x_LE: torch.Tensor) -> torch.Tensor:
        return self.norm(functional.gelu(self.dense(x_LE)))


class Decoder(nn.Module):
    """The bias of the output layer; its weight is tied to the embedding."""

    def __init__(self, shape: Shape, state: ParallelState) -> None:
        super().__init__()
        spec = ShardSpec(dim=0, size=shape.vocabulary)
        self.bias = mark_sharded(nn.Parameter(torch.empty(spec.local(state.tensor_size))), spec)


class ModernBert(nn.Module):
    """Encoder and prediction head: the same parameters for masked and causal language modeling."""

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
        """Return a full fp32 parameter of a new model: it depends on seed and name, not on the tensor-parallel size.

        Normal with standard deviation initializer_range, for output projections divided by sqrt(2 layers), truncated at
        2 sigma; norms 1, bias 0.
        """
        full = torch.empty(self.full_sizes()[name])
        if full.dim() == 1:
            return full.fill_(0.0 if name == "decoder.bias" else 1.0)
        std = self.shape.initializer_range / (math.sqrt(2 * self.shape.layers) if name.endswith("Wo.weight") else 1)
        generator = torch.Generator().manual_seed((seed << 32) | zlib.crc32(name.encode()))
        return nn.init.trunc_normal_(full, std=std, a=-2 * std, b=2 * std, generator=generator)

    def full_sizes(self) -> dict[str, tuple[int, ...]]:
        """Return the unsharded size of every parameter by name."""
        sizes = {}
        for name, parameter in self.named_parameters():
            size, spec = list(parameter.shape), spec_of(parameter)
            if spec is not None:
                size[spec.dim] = spec.size
            sizes[name] = tuple(size)
        return sizes
