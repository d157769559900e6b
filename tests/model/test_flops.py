"""The count of operations against hand counts and torch's own counter."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from megatron_detour.model.attention import AttentionPattern, dense_attention
from megatron_detour.model.compute import Compute
from megatron_detour.model.families import FAMILIES, read_shape
from megatron_detour.model.flops import Frozen, training_flops, visible_pairs
from megatron_detour.parallel.state import ParallelState
from tests.models import CONFIG, config_of, microbatch

SHAPE = read_shape(CONFIG, "tests")


@pytest.mark.parametrize("window", [None, 0, 1, 4, 64])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 2, 4, 5, 6, 64, 65, 66, 130])
def test_visible_pairs_are_those_of_the_pattern(length, causal, window):
    pattern = AttentionPattern((length,), causal, window, torch.device("cpu"))
    assert visible_pairs(length, causal, window) == int(pattern.visible().sum())


def test_a_small_model_counted_by_hand():
    # Layers 0 and 3 are global; a local query sees 8 keys on each side.
    assert SHAPE.layer_types == ("full_attention", *["sliding_attention"] * 2, "full_attention", "sliding_attention")
    assert (SHAPE.hidden, SHAPE.intermediate, SHAPE.vocabulary, SHAPE.window) == (32, 48, 301, 8)
    # A token and a layer: Wqkv 32 x 96, Wo 32 x 32, Wi 32 x 96, Wo 48 x 32, a multiplication and an addition each.
    linear = 14 * 5 * 2 * (32 * 96 + 32 * 32 + 32 * 96 + 48 * 32)
    # Documents of 12 and 2 tokens. Local and bidirectional, the 12 tokens see 9, 10, 11, 12, 12, ... , 11, 10, 9 keys.
    everything, local = 12 * 12 + 2 * 2, (9 + 10 + 11 + 12 + 12 + 12) * 2 + 2 * 2
    attention = (2 * everything + 3 * local) * (2 * 32 + 2 * 32)  # q k and the sum of values
    head = 7 * 2 * (32 * 32 + 32 * 301)
    assert training_flops(SHAPE, (12, 2), causal=False, labeled=7) == 3 * (linear + attention + head)
    # Causal, token i of a document sees i + 1 keys, in a local layer up to 9.
    everything, local = 78 + 3, 45 + 9 * 3 + 3
    attention = (2 * everything + 3 * local) * (2 * 32 + 2 * 32)
    assert training_flops(SHAPE, (12, 2), causal=True, labeled=7) == 3 * (linear + attention + head)


def dense_by_document(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: AttentionPattern) -> torch.Tensor:
    documents = zip(*(x.split(pattern.lengths) for x in (q, k, v)), pattern.lengths, strict=True)
    alone = [(*parts, AttentionPattern((length,), False, None, pattern.device)) for *parts, length in documents]
    return torch.cat([dense_attention(*each) for each in alone])


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("lengths", [(9,), (5, 9, 1)])
@pytest.mark.parametrize("labeled", [0.0, 0.4, 1.0])
def test_torch_counts_as_many(lengths, labeled, model_type):
    """Documents within the window, so that a query and a key of a document always see each other."""
    shape = read_shape(config_of(model_type), "tests")
    model = shape.build(ParallelState(), Compute(attention=dense_by_document))
    batch = microbatch(lengths, causal=False, labeled=labeled)
    with FlopCounterMode(display=False) as forward:
        hidden = model.hidden(batch.input_ids, batch.positions, batch.lengths, False)
        features = model.features(hidden[batch.labeled])
        logits = functional.linear(features, model.output_weight, model.output_bias)
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    counted = training_flops(shape, lengths, causal=False, labeled=len(batch.labeled))
    assert forward.get_total_flops() == counted / 3
    assert backward.get_total_flops() == counted * 2 / 3


@pytest.mark.parametrize(
    "parts", [(), ("layers.1-2",), ("embeddings", "layers.0"), ("embeddings", "layers.0-1", "layers.3"), ("head",)]
)
def test_torch_counts_as_many_where_parts_are_frozen(parts):
    model = SHAPE.build(ParallelState(), Compute(attention=dense_by_document))
    frozen = model.shape.names_of(parts) if parts else ()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    batch = microbatch((5, 9, 1), causal=False, labeled=0.4)
    with FlopCounterMode(display=False) as counter:
        hidden = model.hidden(batch.input_ids, batch.positions, batch.lengths, False)
        features = model.features(hidden[batch.labeled])
        weight = model.model.embeddings.tok_embeddings.weight
        functional.linear(features, weight, model.decoder.bias).sum().backward()
    counted = training_flops(SHAPE, (5, 9, 1), False, len(batch.labeled), Frozen.from_parts(parts))
    assert counter.get_total_flops() == counted


def test_causal_training_costs_less():
    for lengths in [(2,), (300,), (5, 9, 1)]:
        causal, bidirectional = (training_flops(SHAPE, lengths, causal=c, labeled=4) for c in (True, False))
        assert causal < bidirectional
    # A token alone sees itself either way.
    assert training_flops(SHAPE, (1,), True, 1) == training_flops(SHAPE, (1,), False, 1)


def test_labels_cost_the_head():
    counts = [training_flops(SHAPE, (50,), True, labeled) for labeled in range(4)]
    assert {after - before for before, after in pairwise(counts)} == {3 * 2 * 32 * (32 + 301)}


def test_documents_packed_cost_what_they_cost_alone():
    packed = training_flops(SHAPE, (70, 3, 20), False, 9)
    assert packed == sum(training_flops(SHAPE, (length,), False, 3) for length in (70, 3, 20))
