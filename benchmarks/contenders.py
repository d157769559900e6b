"""The models measured: this project's, and transformers' as users run it and at its best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.workload import Document, Workload
from megatron_detour.data.batches import MicroBatch, document_positions
from megatron_detour.errors import DetourError, format_faults
from megatron_detour.model.attention import AttentionPattern
from megatron_detour.model.compute import Compute
from megatron_detour.model.families import read_shape
from megatron_detour.model.flops import training_flops
from megatron_detour.objectives import IGNORE
from megatron_detour.parallel.shard import shard, spec_of
from megatron_detour.parallel.state import ParallelState


@dataclass(frozen=True)
class Contender:
    """`loss` is the mean over a batch's labeled positions; the batches together contain every document once."""

    name: str
    model: torch.nn.Module
    batches: list[Any]
    loss: Callable[[Any], torch.Tensor]
    positions: int  # computed, including padding

    def step(self) -> None:
        for batch in self.batches:
            self.loss(batch).backward()


@dataclass(frozen=True)
class Peer:
    """How transformers is run: its attn_implementation, and whether its model is compiled with torch.compile."""

    attention: str
    compile: bool
    device: torch.device
    dtype: torch.dtype

    def model(self, config: dict[str, Any], causal: bool) -> torch.nn.Module:
        """Return a model with random weights. Raises DetourError if transformers has no such attention."""
        from transformers import ModernBertConfig, ModernBertDecoderConfig, ModernBertDecoderForCausalLM
        from transformers import ModernBertForMaskedLM as MaskedModel

        given = {key: value for key, value in config.items() if key != "model_type"}
        torch.manual_seed(0)
        try:
            if causal:
                given.pop("sparse_prediction", None)
                chosen = ModernBertDecoderConfig(**given, attn_implementation=self.attention)
                model = ModernBertDecoderForCausalLM(chosen)
            else:
                model = MaskedModel(ModernBertConfig(**given, attn_implementation=self.attention))
        except (ImportError, ValueError) as error:
            raise DetourError(f"--peer-attention: {' '.join(str(error).split())}") from None
        model = model.to(self.device, self.dtype).train()
        return torch.compile(model, dynamic=True) if self.compile else model


def ours(
    config: dict[str, Any], work: Workload, micro: int, compute: Compute, state: ParallelState, device, dtype
) -> tuple[Contender, int]:
    """Return this project's model on packed sequences, padded to the sequence length, and the FLOPs of a step."""
    shape = read_shape(config, "benchmark")
    if faults := shape.tensor_parallel_faults(state.tensor_size):
        raise DetourError(format_faults(faults))
    with torch.device(device):
        model = shape.build(state, compute).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            full = model.initial_weight(name, seed=0)
            parameter.copy_(shard(full, spec_of(parameter), state.tensor_rank, state.tensor_size))
    batches = [_flat(rows, work).to(device) for rows in _groups(work.packs(), micro)]

    def loss(batch: MicroBatch) -> torch.Tensor:
        return model(*batch.arguments).loss / len(batch.labels)

    # Padding does not count, as training has none.
    flops = sum(
        training_flops(shape, (len(d.inputs),), work.causal, int((d.labels != IGNORE).sum())) for d in work.documents
    )
    positions = sum(len(batch.input_ids) for batch in batches)
    name = "megatron_detour, compiled" if compute.compile else "megatron_detour"
    return Contender(name, model, batches, loss, positions), flops


def transformers_padded(config: dict[str, Any], work: Workload, batch: int, peer: Peer) -> Contender:
    """Batches of documents in order, padded to the longest of each, as by transformers' data collators."""
    model = peer.model(config, work.causal)
    batches, positions = [], 0
    for documents in _groups(work.documents, batch):
        longest = max(len(d.inputs) for d in documents)
        ids = _rows([d.inputs for d in documents], longest, work.vocabulary.pad)
        mask = _rows([np.ones_like(d.inputs) for d in documents], longest, 0)
        labels = _peer_labels([[d] for d in documents], longest, work.causal)
        given = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        batches.append(_moved(given, peer.device))
        positions += ids.numel()
    return Contender("transformers, padded", model, batches, lambda given: model(**given).loss, positions)


def transformers_packed(config: dict[str, Any], work: Workload, micro: int, peer: Peer) -> Contender:
    """Packed sequences with positions and masks that separate documents, and the head only on masked positions.

    SDPA gets a mask of all pairs of positions; FlashAttention gets one flat row and the starts of documents.
    """
    flash = peer.attention.startswith("flash")
    model = peer.model(config | {"sparse_prediction": True}, work.causal)
    window = read_shape(config, "benchmark").window
    window = window and window - work.causal  # its decoder attends to one key fewer
    batches, positions = [], 0
    for packs in _groups(work.packs(), micro):
        length = sum(len(d.inputs) for pack in packs for d in pack) if flash else work.sequence_length
        rows = [[d for pack in packs for d in pack]] if flash else packs
        lengths = [_lengths(row, length) for row in rows]
        given = {
            "input_ids": _rows([np.concatenate([d.inputs for d in row]) for row in rows], length, work.vocabulary.pad),
            "position_ids": torch.from_numpy(np.stack([document_positions(np.array(row)) for row in lengths])),
            "labels": _peer_labels(rows, length, work.causal),
        }
        if flash:
            (row,) = lengths
            ends = torch.tensor([0, *np.cumsum(row)], dtype=torch.int32)
            given |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
            given |= {"max_length_q": max(row), "max_length_k": max(row)}
        else:
            given["attention_mask"] = {
                "full_attention": _masks(lengths, work.causal, None),
                "sliding_attention": _masks(lengths, work.causal, window),
            }
        batches.append(_moved(given, peer.device))
        positions += given["input_ids"].numel()
    return Contender("transformers, packed", model, batches, lambda given: model(**given).loss, positions)


def _peer_labels(rows: list[list[Document]], length: int, causal: bool) -> torch.Tensor:
    """transformers' causal models shift the labels themselves: a document's first token has no label."""
    labels = []
    for row in rows:
        arrays = [np.concatenate([[IGNORE], d.labels[:-1]]) if causal else d.labels for d in row]
        labels.append(np.concatenate(arrays))
    return _rows(labels, length, IGNORE)


def _flat(packs: list[list[Document]], work: Workload) -> MicroBatch:
    inputs, labels, lengths = [], [], []
    for pack in packs:
        lengths += _lengths(pack, work.sequence_length)
        missing = work.sequence_length - sum(len(d.inputs) for d in pack)
        inputs += [*(d.inputs for d in pack), np.full(missing, work.vocabulary.pad)]
        labels += [*(d.labels for d in pack), np.full(missing, IGNORE)]
    inputs, labels = np.concatenate(inputs), np.concatenate(labels)
    where = np.flatnonzero(labels != IGNORE)
    positions = document_positions(np.array(lengths))
    ids, positions, where, labels = (torch.from_numpy(x) for x in (inputs, positions, where, labels[where]))
    return MicroBatch(ids, positions, tuple(lengths), work.causal, where, labels)


def _lengths(row: list[Document], length: int) -> list[int]:
    """Return the lengths of a row's documents; the last one is padding, if any."""
    lengths = [len(document.inputs) for document in row]
    missing = length - sum(lengths)
    return [*lengths, missing] if missing else lengths


def _masks(lengths: list[list[int]], causal: bool, window: int | None) -> torch.Tensor:
    """Return attention masks, bool [rows, 1, T, T]."""
    cpu = torch.device("cpu")
    return torch.stack([AttentionPattern(tuple(row), causal, window, cpu).visible()[None] for row in lengths])


def _rows(arrays: list[np.ndarray], length: int, fill: int) -> torch.Tensor:
    rows = np.full((len(arrays), length), fill, dtype=np.int64)
    for row, array in zip(rows, arrays, strict=True):
        row[: len(array)] = array
    return torch.from_numpy(rows)


def _groups(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return value.to(device) if isinstance(value, torch.Tensor) else value
