"""Our ModernBERT against transformers', and what its attention must not do."""

from __future__ import annotations

import pytest
import torch
from transformers import ModernBertConfig, ModernBertForMaskedLM

from megatron_detour.errors import DetourError
from megatron_detour.model.shape import Shape
from tests.models import CONFIG, loss_of, microbatch, tiny

LENGTHS = (3, 70, 40, 1, 300)  # shorter and longer than the window, and longer than a block of queries


@pytest.fixture(scope="module")
def pair():
    """Ours and transformers' model with the same weights."""
    ours = tiny()
    theirs = ModernBertForMaskedLM(ModernBertConfig(**{k: v for k, v in CONFIG.items() if k != "model_type"})).eval()
    weights = dict(ours.state_dict())
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert set(missing) <= {"decoder.weight"} and not unexpected
    theirs.tie_weights()
    return ours, theirs


def test_logits_equal_transformers_packed_or_alone(pair):
    ours, theirs = pair
    batch = microbatch(LENGTHS, causal=False)
    with torch.no_grad():
        packed = ours.logits(batch.input_ids, batch.positions, LENGTHS)
        documents = batch.input_ids.split(LENGTHS)
        reference = torch.cat([theirs(input_ids=document[None]).logits[0] for document in documents])
    assert reference.std() > 0.5
    assert (packed - reference).abs().max() < 1e-5 * reference.abs().max()


def test_loss_and_gradients_equal_transformers(pair):
    ours, theirs = pair
    batch = microbatch(LENGTHS, causal=False)
    out = loss_of(ours, batch)
    ours.zero_grad()
    out.loss.backward()
    documents = batch.input_ids.split(LENGTHS)
    logits = torch.cat([theirs(input_ids=document[None]).logits[0] for document in documents])
    reference = torch.nn.functional.cross_entropy(logits[batch.labelled], batch.labels, reduction="sum")
    theirs.zero_grad()
    reference.backward()
    assert out.labelled == len(batch.labels)
    assert int(out.right) == int((logits[batch.labelled].argmax(-1) == batch.labels).sum())
    torch.testing.assert_close(out.loss, reference, rtol=1e-5, atol=0)
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-3, msg=name)


@pytest.mark.parametrize("changed", [0, 37, 90, 150])
def test_causal_positions_never_see_their_future(changed):
    model = tiny()
    batch = microbatch((160,), causal=True)
    other = batch.input_ids.clone()
    other[changed] = 3 + (other[changed] - 2) % 298
    with torch.no_grad():
        before = model.logits(batch.input_ids, batch.positions, batch.lengths, causal=True)
        after = model.logits(other, batch.positions, batch.lengths, causal=True)
    assert torch.equal(before[:changed], after[:changed])
    assert not torch.equal(before[changed:], after[changed:])


@pytest.mark.parametrize("causal", [False, True])
def test_packed_documents_do_not_see_each_other(causal):
    model = tiny()
    batch = microbatch((50, 60), causal)
    other = batch.input_ids.clone()
    other[:50] = other[:50].flip(0)
    with torch.no_grad():
        before = model.logits(batch.input_ids, batch.positions, batch.lengths, causal)
        after = model.logits(other, batch.positions, batch.lengths, causal)
    assert torch.equal(before[50:], after[50:])
    assert not torch.equal(before[:50], after[:50])


def test_a_microbatch_without_labels_has_zero_loss_and_gradients():
    model = tiny()
    loss_of(model, microbatch((20,), causal=False, labelled=0.0)).loss.backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


def test_old_and_new_configurations_mean_the_same_shape():
    old = CONFIG | {"global_rope_theta": 1000.0, "local_rope_theta": 500.0, "global_attn_every_n_layers": 2}
    new = CONFIG | {
        "layer_types": ["full_attention", "sliding_attention"] * 2 + ["full_attention"],
        "rope_parameters": {"full_attention": {"rope_theta": 1000.0}, "sliding_attention": {"rope_theta": 500.0}},
    }
    assert Shape.of(old, "old") == Shape.of(new, "new")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "bert"}, "'bert'"),
        ({"norm_bias": True}, "norm_bias"),
        ({"hidden_size": 30}, "hidden_size 30"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "'yarn'"),
        ({"vocab_size": None}, "vocab_size|size is wrong"),
    ],
)
def test_another_kind_of_model_is_refused(change, told):
    with pytest.raises(DetourError, match=told):
        Shape.of(CONFIG | change, "somewhere")


def test_rotary_tables_equal_transformers_at_far_positions():
    from transformers.models.modernbert.modeling_modernbert import ModernBertRotaryEmbedding

    from megatron_detour.model.rotary import rotary_tables

    config = ModernBertConfig(**{k: v for k, v in CONFIG.items() if k != "model_type"})
    positions = torch.arange(8192)
    for layer_type, theta in (("full_attention", 160_000.0), ("sliding_attention", 10_000.0)):
        cos, sin = ModernBertRotaryEmbedding(config)(torch.zeros(1), positions[None], layer_type)
        ours = rotary_tables(positions, 8, theta)
        torch.testing.assert_close(ours[0], cos[0, :, :4], rtol=0, atol=1e-6)
        torch.testing.assert_close(ours[1], sin[0, :, :4], rtol=0, atol=1e-6)
