"""The same weights give the same function here and in transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import ModernBertConfig, ModernBertDecoderConfig, ModernBertDecoderForCausalLM, PreTrainedModel

from megatron_detour.model.attention import AttentionPattern
from megatron_detour.model.families import FAMILIES
from megatron_detour.model.families.base import FULL, SLIDING
from megatron_detour.model.language_model import LanguageModel
from tests.models import CONFIG, config_of, loss_of, microbatch, tiny

pytestmark = pytest.mark.integration

LENGTHS = (3, 70, 40, 1, 300)  # shorter and longer than the window
BIASED = dict.fromkeys(("norm_bias", "attention_bias", "mlp_bias", "classifier_bias"), True)
SHAPES = {
    "tiny": {},
    "biased": BIASED | {"decoder_bias": False, "hidden_activation": "silu", "classifier_activation": "gelu_new"},
    "as mmBERT": {
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 160_000.0} for kind in (FULL, SLIDING)}
    },
    "base-like": {
        "hidden_size": 768,
        "intermediate_size": 1152,
        "num_attention_heads": 12,
        "num_hidden_layers": 4,
        "local_attention": 128,
    },
    "large-like": {
        "hidden_size": 1024,
        "intermediate_size": 2624,
        "num_attention_heads": 16,
        "num_hidden_layers": 4,
        "local_attention": 128,
    },
}


OTHERS = {name: {"model_type": name} for name in FAMILIES if name != "modernbert"}
OTHERS["eurobert tied"] = {"model_type": "eurobert", "tie_word_embeddings": True}


def given_to_transformers(changes: dict) -> dict:
    return {key: value for key, value in config_of(**changes).items() if key != "model_type"}


@pytest.fixture(scope="module", params=[*SHAPES, *OTHERS])
def pair(request) -> tuple[LanguageModel, PreTrainedModel]:
    """Ours and transformers' model with the same weights."""
    changes = (SHAPES | OTHERS)[request.param]
    ours = tiny(scale=1.5 if request.param.endswith("-like") else 5.0, **changes)
    config_class, model_class = ours.shape.transformers_classes()
    theirs = model_class(config_class(**given_to_transformers(changes))).eval()
    missing, unexpected = theirs.load_state_dict(dict(ours.state_dict()), strict=False)
    tied = {"decoder.weight", "cls.predictions.decoder.weight", "lm_head.decoder.weight", "lm_head.weight"}
    assert set(missing) <= tied | {name.replace("weight", "bias") for name in tied} and not unexpected
    theirs.tie_weights()
    return ours, theirs


@torch.no_grad()
def test_logits_packed_and_alone(pair):
    ours, theirs = pair
    batch = microbatch(LENGTHS, causal=False)
    documents = batch.input_ids.split(LENGTHS)
    packed = ours.logits(batch.input_ids, batch.positions, LENGTHS)
    alone = torch.cat([ours.logits(ids, torch.arange(len(ids)), (len(ids),)) for ids in documents])
    reference = torch.cat([theirs(input_ids=ids[None]).logits[0] for ids in documents])
    assert_logits_close(packed, reference)
    assert_logits_close(alone, reference)


@torch.no_grad()
def test_logits_of_their_padded_batch(pair):
    ours, theirs = pair
    batch = microbatch(LENGTHS, causal=False)
    documents = batch.input_ids.split(LENGTHS)
    rows = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True, padding_value=CONFIG["pad_token_id"])
    mask = torch.arange(rows.shape[1]) < torch.tensor(LENGTHS)[:, None]
    reference = theirs(input_ids=rows, attention_mask=mask.long()).logits[mask]
    assert_logits_close(ours.logits(batch.input_ids, batch.positions, LENGTHS), reference)


@torch.no_grad()
def test_logits_of_their_packed_batch(pair):
    ours, theirs = pair
    batch = microbatch(LENGTHS, causal=False)
    cpu = torch.device("cpu")
    masks = {
        "full_attention": AttentionPattern(LENGTHS, False, None, cpu).visible()[None, None],
        "sliding_attention": AttentionPattern(LENGTHS, False, ours.shape.window, cpu).visible()[None, None],
    }
    first = getattr(ours.shape, "first_position", 0)  # RoBERTa's table of positions begins with unused ones
    reference = theirs(
        input_ids=batch.input_ids[None],
        attention_mask=masks if ours.shape.model_type == "modernbert" else masks["full_attention"],
        position_ids=first + batch.positions[None],
    ).logits[0]
    assert_logits_close(ours.logits(batch.input_ids, batch.positions, LENGTHS), reference)


def test_loss_and_gradients(pair):
    ours, theirs = pair
    batch = microbatch(LENGTHS, causal=False)
    ours.zero_grad()
    out = loss_of(ours, batch)
    out.loss.backward()
    logits = torch.cat([theirs(input_ids=ids[None]).logits[0] for ids in batch.input_ids.split(LENGTHS)])
    logits = logits[batch.labeled]
    reference = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum")
    theirs.zero_grad()
    reference.backward()
    assert out.labeled == len(batch.labels)
    assert int(out.right) == int((logits.argmax(-1) == batch.labels).sum())
    torch.testing.assert_close(out.loss, reference, rtol=1e-5, atol=0)
    expected = dict(theirs.named_parameters(remove_duplicate=False))
    for name, parameter in ours.named_parameters():
        # The bias of keys has no gradient: it moves all scores of a query alike.
        greatest = float(expected[name.replace("key.bias", "key.weight")].grad.abs().max())
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-4 * greatest, msg=name)


@torch.no_grad()
def test_causal_logits(pair):
    """Against theirs with a causal mask: each kind of layer with its window."""
    ours, theirs = pair
    if ours.shape.model_type == "modernbert":
        pytest.skip("compared with its decoder below")
    batch = microbatch(LENGTHS, causal=True)
    mask = AttentionPattern(LENGTHS, True, None, torch.device("cpu")).visible()[None, None]
    positions = getattr(ours.shape, "first_position", 0) + batch.positions
    reference = theirs(input_ids=batch.input_ids[None], attention_mask=mask, position_ids=positions[None]).logits[0]
    assert_logits_close(ours.logits(batch.input_ids, batch.positions, LENGTHS, causal=True), reference)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_causal_logits_equal_their_decoder_with_the_window_matched(shape):
    """Their sliding window counts the query's own key: one more than ours makes the same keys."""
    changes = SHAPES[shape]
    ours = tiny(scale=1.5 if shape.endswith("-like") else 5.0, **changes)
    wider = {"local_attention": 2 * (ours.shape.window + 1)}
    theirs = ModernBertDecoderForCausalLM(ModernBertDecoderConfig(**given_to_transformers(changes | wider))).eval()
    missing, unexpected = theirs.load_state_dict(as_decoder(ours), strict=False)
    assert set(missing) <= {"decoder.weight"} and not unexpected
    theirs.tie_weights()
    batch = microbatch(LENGTHS, causal=True)
    reference = torch.cat([theirs(input_ids=ids[None]).logits[0] for ids in batch.input_ids.split(LENGTHS)])
    assert_logits_close(ours.logits(batch.input_ids, batch.positions, LENGTHS, causal=True), reference)


def as_decoder(model: LanguageModel) -> dict[str, torch.Tensor]:
    """The weights under ModernBertDecoder's names: q, k and v apart, the head as lm_head."""
    weights = {}
    for name, weight in model.state_dict().items():
        if ".Wqkv." in name:
            for kind, part in zip("qkv", weight.chunk(3), strict=True):
                weights[name.replace("Wqkv", f"{kind}_proj")] = part
        else:
            weights[name.replace("head.", "lm_head.", 1) if name.startswith("head.") else name] = weight
    return weights


def assert_logits_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert theirs.std() > 0.3
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_rotary_tables_at_far_positions():
    from transformers.models.modernbert.modeling_modernbert import ModernBertRotaryEmbedding

    from megatron_detour.model.embeddings import rotary_tables

    config = ModernBertConfig(**given_to_transformers({}))
    positions = torch.arange(8192)
    for layer_type, theta in (("full_attention", 160_000.0), ("sliding_attention", 10_000.0)):
        cos, sin = ModernBertRotaryEmbedding(config)(torch.zeros(1), positions[None], layer_type)
        ours = rotary_tables(positions, 8, theta)
        torch.testing.assert_close(ours[0], cos[0, :, :4], rtol=0, atol=1e-6)
        torch.testing.assert_close(ours[1], sin[0, :, :4], rtol=0, atol=1e-6)
