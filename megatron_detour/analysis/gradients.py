"""Where the loss pulls: the share of the gradient that falls on each layer, under CLM and under MLM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_detour.checkpoint.huggingface import load_model
from megatron_detour.checkpoint.source import Source
from megatron_detour.data.batches import MicroBatch, document_positions
from megatron_detour.errors import DetourError
from megatron_detour.model.families import read_shape
from megatron_detour.model.language_model import LanguageModel
from megatron_detour.objectives import Corruption, validated
from megatron_detour.tokenizer.vocabulary import load_tokenizer, load_vocabulary

MASK_RATE, SEED = 0.30, 0  # the rate of the paper's control in its first phase
MICRO_TOKENS = 4096  # per forward pass


def gradient_shares(model: Path, texts: Sequence[str], max_tokens: int = 512) -> dict[str, np.ndarray]:
    """Return each layer's share of the squared norm of all layers' gradients, by objective, float64 [layers].

    The gradient is that of the mean loss over all labeled tokens of the texts as one batch, in fp32, computed by the
    project's own encoder: CLM with causal attention, MLM with 30% of the tokens masked. Embeddings and head are left
    out. The model is a folder that training could start from. Raises DetourError for any other.
    """
    source = Source(str(model))
    shape = read_shape(source.config(), str(model))
    vocabulary, tokenizer = load_vocabulary(model), load_tokenizer(model)
    longest = min(max_tokens, shape.max_positions)
    documents = [np.array(tokenizer.encode(text).ids[:longest]) for text in texts]
    if not documents:
        raise DetourError("no texts to measure gradients on")
    network = load_model(source, shape).to("cuda" if torch.cuda.is_available() else "cpu")
    shares = {}
    for name, kind in validated().items():
        if all(getattr(vocabulary, role) is not None for role in kind.special_tokens):
            corruption = kind.for_validation(MASK_RATE).bind(vocabulary)
            shares[name] = _shares(network, corruption, documents)
    return shares


def _shares(network: LanguageModel, corruption: Corruption, documents: list[np.ndarray]) -> np.ndarray:
    network.zero_grad()
    device = next(network.parameters()).device
    labeled = 0
    for batch in _micro_batches(corruption, documents):
        labeled += len(batch.labels)
        if len(batch.labels):
            network(*batch.to(device).arguments).loss.backward()
    squares = np.zeros(network.shape.layers)
    for number in range(network.shape.layers):
        names = network.shape.names_of((f"layers.{number}",))
        for name, parameter in network.named_parameters():
            if name in names and parameter.grad is not None:
                squares[number] += float(parameter.grad.double().square().sum())
    if not labeled or not np.isfinite(squares).all() or not squares.sum():
        raise DetourError("the gradient is zero or not finite; give more texts, or the model has diverged")
    return squares / squares.sum()


def _micro_batches(corruption: Corruption, documents: list[np.ndarray]) -> Iterator[MicroBatch]:
    """Yield the documents in flat batches; a document's masks depend on its number alone."""
    first = 0
    while first < len(documents):
        last, tokens = first, 0
        while last < len(documents) and (last == first or tokens + len(documents[last]) <= MICRO_TOKENS):
            tokens += len(documents[last])
            last += 1
        lengths = np.array([len(document) for document in documents[first:last]])
        found = corruption.apply(np.concatenate(documents[first:last]), lengths, SEED, np.arange(first, last))
        tensors = (found.inputs, document_positions(lengths), found.labeled, found.labels)
        inputs, positions, labeled, labels = map(torch.from_numpy, tensors)
        yield MicroBatch(inputs, positions, tuple(lengths.tolist()), corruption.causal, labeled, labels)
        first = last
