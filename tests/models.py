"""Tiny models for tests, of any family: five layers; ModernBERT's are local and global, with short windows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from megatron_detour.data.batches import MicroBatch, document_positions
from megatron_detour.model.compute import Compute
from megatron_detour.model.families import read_shape
from megatron_detour.model.language_model import LanguageModel
from megatron_detour.parallel.loss import LossSum
from megatron_detour.parallel.shard import shard, spec_of
from megatron_detour.parallel.state import ParallelState

CONFIG = {
    "model_type": "modernbert",
    "vocab_size": 301,  # odd: no tensor-parallel size divides it
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "local_attention": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# What distinguishes a family; sizes as above.
OWN = {
    "bert": {"hidden_act": "gelu_new", "max_position_embeddings": 512},
    "roberta": {"type_vocab_size": 1, "max_position_embeddings": 513},  # the first position has number 1
    "camembert": {"max_position_embeddings": 513},
    "xlm-roberta": {"max_position_embeddings": 514, "pad_token_id": 1, "cls_token_id": 0, "bos_token_id": 0},
    "eurobert": {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512},
}


def config_of(model_type: str = "modernbert", **changes) -> dict[str, Any]:
    """The config.json of a tiny model of a family."""
    return CONFIG | {"model_type": model_type} | OWN.get(model_type, {}) | changes


def tiny(
    state: ParallelState | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 3,
    compute: Compute | None = None,
    z_loss: float = 0.0,
    scale: float = 5.0,
    **changes,
) -> LanguageModel:
    """A fresh tiny model with weights large enough to matter, the same for every tensor-parallel size."""
    state = state or ParallelState()
    model = read_shape(config_of(**changes), "tests").build(state, compute, z_loss).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            full = model.initial_weight(name, seed).to(dtype)
            full = full * scale + (0.1 * torch.sin(torch.arange(full.numel()).view_as(full)) if full.dim() == 1 else 0)
            parameter.copy_(shard(full, spec_of(parameter), state.tensor_rank, state.tensor_size))
    return model


def microbatch(lengths: tuple[int, ...], causal: bool, labeled: float = 0.5, seed: int = 0) -> MicroBatch:
    """Random documents of these lengths, a share of their positions labeled."""
    generator = np.random.default_rng(seed)
    total = sum(lengths)
    ids = generator.integers(3, CONFIG["vocab_size"], total)
    where = np.flatnonzero(generator.random(total) < labeled)
    labels = generator.integers(3, CONFIG["vocab_size"], len(where))
    ids, positions, where, labels = (
        torch.from_numpy(x) for x in (ids, document_positions(np.array(lengths)), where, labels)
    )
    return MicroBatch(ids, positions, lengths, causal, where, labels)


def together(batches: list[MicroBatch]) -> MicroBatch:
    """One microbatch after the other as one."""
    starts = np.cumsum([0, *(len(batch.input_ids) for batch in batches)])
    return MicroBatch(
        torch.cat([batch.input_ids for batch in batches]),
        torch.cat([batch.positions for batch in batches]),
        tuple(length for batch in batches for length in batch.lengths),
        batches[0].causal,
        torch.cat([batch.labeled + int(start) for batch, start in zip(batches, starts, strict=False)]),
        torch.cat([batch.labels for batch in batches]),
    )


def loss_of(model: LanguageModel, batch: MicroBatch) -> LossSum:
    return model(*batch.arguments)
