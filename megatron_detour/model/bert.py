"""BERT and RoBERTa: layers with the norm after each sum, biases and a table of positions.

T positions, E hidden size, L labeled positions, H local heads, D head size. S positions are T, or this tensor rank's
part of them under sequence parallelism. Modules have the names of transformers' parameters.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from megatron_detour.model.activations import get_activation
from megatron_detour.model.attention import AttentionPattern
from megatron_detour.model.compute import Compute
from megatron_detour.model.families.bert import Bert, Roberta
from megatron_detour.model.head import OutputBias
from megatron_detour.model.language_model import LanguageModel
from megatron_detour.model.norm import LayerNorm
from megatron_detour.parallel.collectives import gather_from_sequence_parallel, own_positions, replicated_weight
from megatron_detour.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    column_parallel,
)
from megatron_detour.parallel.state import ParallelState


class BertEmbeddings(nn.Module):
    """ids and positions [T] -> the norm of the sum of token, position and token type embeddings [S, E]."""

    def __init__(self, shape: Bert, state: ParallelState, compute: Compute) -> None:
        super().__init__()
        self.state, self.first_position = state, shape.first_position
        self.word_embeddings = VocabParallelEmbedding(shape.vocabulary, shape.hidden, state)
        self.position_embeddings = nn.Embedding(shape.first_position + shape.max_positions, shape.hidden)
        self.token_type_embeddings = nn.Embedding(shape.token_types, shape.hidden)
        self.LayerNorm = LayerNorm(shape, compute, state, bias=True)

    def forward(self, ids_T: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        table, types = (
            replicated_weight(embedding.weight, self.state)
            for embedding in (self.position_embeddings, self.token_type_embeddings)
        )
        positions_S = own_positions(positions_T, self.state) + self.first_position
        # All tokens have type 0: a document is one segment.
        return self.LayerNorm(self.word_embeddings(ids_T) + types[0] + functional.embedding(positions_S, table))


class Heads(nn.Module):
    """x [S, E] -> queries, keys and values [T, H, D]."""

    def __init__(self, shape: Bert, state: ParallelState) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.query, self.key, self.value = (
            ColumnParallelLinear(shape.hidden, shape.hidden, state, bias=True) for _ in range(3)
        )

    def forward(self, x_SE: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parts = column_parallel(x_SE, self.query, self.key, self.value)
        return tuple(part.unflatten(1, (-1, self.head_dim)) for part in parts)


class Output(nn.Module):
    """Back into the residual stream, and its norm: x [T, inputs / n] and residual [S, E] -> [S, E]."""

    def __init__(self, shape: Bert, inputs: int, state: ParallelState, compute: Compute) -> None:
        super().__init__()
        self.dense = RowParallelLinear(inputs, shape.hidden, state, bias=True)
        self.LayerNorm = LayerNorm(shape, compute, state, bias=True)


class Attention(nn.Module):
    def __init__(self, shape: Bert, state: ParallelState, compute: Compute) -> None:
        super().__init__()
        self.compute = compute
        self.self = Heads(shape, state)
        self.output = Output(shape, shape.hidden, state, compute)

    def forward(self, x_SE: torch.Tensor, pattern: AttentionPattern) -> torch.Tensor:
        attended_THD = self.compute.attention(*self.self(x_SE), pattern)
        return self.output.LayerNorm(x_SE + self.output.dense(attended_THD.flatten(1)))


class Intermediate(nn.Module):
    def __init__(self, shape: Bert, state: ParallelState) -> None:
        super().__init__()
        self.dense = ColumnParallelLinear(shape.hidden, shape.intermediate, state, bias=True)


class Layer(nn.Module):
    def __init__(self, shape: Bert, state: ParallelState, compute: Compute) -> None:
        super().__init__()
        self.compute, self.activation = compute, get_activation(shape.activation)
        self.attention = Attention(shape, state, compute)
        self.intermediate = Intermediate(shape, state)
        self.output = Output(shape, shape.intermediate, state, compute)

    def forward(self, x_SE: torch.Tensor, pattern: AttentionPattern) -> torch.Tensor:
        x_SE = self.attention(x_SE, pattern)
        inner = self.intermediate.dense(x_SE)
        change_SE = self.compute.checkpoint("selective", lambda a: self.output.dense(self.activation(a)), inner)
        return self.output.LayerNorm(x_SE + change_SE)


class Layers(nn.Module):
    def __init__(self, shape: Bert, state: ParallelState, compute: Compute) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(shape, state, compute) for _ in range(shape.layers))


class Encoder(nn.Module):
    """ids and positions [T] -> hidden states [T, E]."""

    def __init__(self, shape: Bert, state: ParallelState, compute: Compute) -> None:
        super().__init__()
        self.state, self.compute = state, compute
        self.embeddings = BertEmbeddings(shape, state, compute)
        self.encoder = Layers(shape, state, compute)

    def forward(
        self, ids_T: torch.Tensor, positions_T: torch.Tensor, lengths: tuple[int, ...], causal: bool
    ) -> torch.Tensor:
        pattern = AttentionPattern(lengths, causal, None, ids_T.device)
        x_SE = self.embeddings(ids_T, positions_T)
        for layer in self.encoder.layer:
            x_SE = self.compute.checkpoint("full", layer, x_SE, pattern)
        return gather_from_sequence_parallel(x_SE, self.state)


class Transform(nn.Module):
    """BERT's prediction head before the output layer."""

    def __init__(self, shape: Bert, compute: Compute) -> None:
        super().__init__()
        self.activation = get_activation(shape.activation)
        self.dense = nn.Linear(shape.hidden, shape.hidden)
        self.LayerNorm = LayerNorm(shape, compute, bias=True)

    def forward(self, x_LE: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.activation(self.dense(x_LE)))


class Predictions(OutputBias):
    def __init__(self, shape: Bert, state: ParallelState, compute: Compute) -> None:
        super().__init__(shape, state)
        self.transform = Transform(shape, compute)


class Head(nn.Module):
    def __init__(self, shape: Bert, state: ParallelState, compute: Compute) -> None:
        super().__init__()
        self.predictions = Predictions(shape, state, compute)


class BertModel(LanguageModel):
    def __init__(self, shape: Bert, state: ParallelState, compute: Compute | None, z_loss: float) -> None:
        super().__init__(shape, state, compute, z_loss)
        self.bert = Encoder(shape, state, self.compute)
        self.cls = Head(shape, state, self.compute)

    def hidden(
        self, input_ids: torch.Tensor, positions: torch.Tensor, lengths: tuple[int, ...], causal: bool
    ) -> torch.Tensor:
        return self.bert(input_ids, positions, lengths, causal)

    def features(self, hidden_LE: torch.Tensor) -> torch.Tensor:
        return self.cls.predictions.transform(hidden_LE)

    @property
    def output_weight(self) -> torch.Tensor:
        return self.bert.embeddings.word_embeddings.weight

    @property
    def output_bias(self) -> torch.Tensor:
        return self.cls.predictions.bias


class RobertaHead(OutputBias):
    def __init__(self, shape: Roberta, state: ParallelState, compute: Compute) -> None:
        super().__init__(shape, state)
        self.dense = nn.Linear(shape.hidden, shape.hidden)
        self.layer_norm = LayerNorm(shape, compute, bias=True)

    def forward(self, x_LE: torch.Tensor) -> torch.Tensor:
        return self.layer_norm(functional.gelu(self.dense(x_LE)))  # whatever the layers' activation


class RobertaModel(LanguageModel):
    def __init__(self, shape: Roberta, state: ParallelState, compute: Compute | None, z_loss: float) -> None:
        super().__init__(shape, state, compute, z_loss)
        self.roberta = Encoder(shape, state, self.compute)
        self.lm_head = RobertaHead(shape, state, self.compute)

    def hidden(
        self, input_ids: torch.Tensor, positions: torch.Tensor, lengths: tuple[int, ...], causal: bool
    ) -> torch.Tensor:
        return self.roberta(input_ids, positions, lengths, causal)

    def features(self, hidden_LE: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden_LE)

    @property
    def output_weight(self) -> torch.Tensor:
        return self.roberta.embeddings.word_embeddings.weight

    @property
    def output_bias(self) -> torch.Tensor:
        return self.lm_head.bias
