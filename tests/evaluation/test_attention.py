"""Encoders that compute no padding: a stand-in takes the place of FlashAttention, which needs a GPU."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AttentionInterface

from megatron_detour.evaluation.finetuning import attention
from megatron_detour.evaluation.finetuning.finetune import build_encoder
from megatron_detour.evaluation.finetuning.heads import open_model
from megatron_detour.evaluation.task_types import TASK_TYPES
from tests.evaluation.test_finetune import model, settings_of, small  # noqa: F401 fixtures

pytestmark = pytest.mark.integration

STAND_IN = "stand_in_for_evaluation"  # transformers looks for a library behind a name with "flash" in it


def stand_in(
    module, query, key, value, attention_mask, *, cu_seq_lens_q, cu_seq_lens_k, sliding_window=None, **options
):
    """Attention within each text; like FlashAttention it sees no mask."""
    assert attention_mask is None and cu_seq_lens_q is cu_seq_lens_k and cu_seq_lens_q.dtype == torch.int32
    lengths = cu_seq_lens_q.diff().tolist()
    assert query.shape[2] == sum(lengths) and options["max_length_q"] == options["max_length_k"] == max(lengths)
    outputs = []
    for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True):
        position = torch.arange(q.shape[2])
        near = (position[:, None] - position).abs() < (sliding_window or len(position))
        outputs.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=near))
    return torch.cat(outputs, 2).transpose(1, 2), None


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("kind", [*TASK_TYPES, "span"])
def test_outputs_and_gradients_are_those_of_padded_batches(kind, pooling, small, model, monkeypatch):  # noqa: F811
    """In fp32, where both differ by the order of sums; a wrong pair of positions would change a tenth."""
    head, kind = ("span", "token-classification") if kind == "span" else ("tokens", kind)
    dataset = small[kind]
    settings = settings_of(kind, f"pooling={pooling}", f"ner_head={head}")
    results = []
    for name in (None, STAND_IN):
        monkeypatch.setattr(attention, "_flash_here", lambda name=name: name)
        transformers.set_seed(0)
        network = open_model(model, dataset, settings).train(head == "tokens")  # the span head has dropout
        assert attention.attention_of(network) == (name or "sdpa")
        encoder = build_encoder(model, network, dataset, settings, dataset.train)
        batch = encoder.kind.collate(encoder(dataset.train[:7]), encoder.tokenizer.pad_token_id)
        assert batch["attention_mask"].min() == 0
        weigh = encoder.kind.loss(dataset.labels, dataset.train)
        inputs = batch if weigh is None else {key: value for key, value in batch.items() if key != "labels"}
        outputs = network(**inputs)
        loss = outputs.loss if weigh is None else weigh(outputs, batch["labels"])
        loss.backward()
        logits = outputs.logits if kind != "token-classification" else outputs.logits[batch["labels"] >= 0]
        gradients = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
        results.append({"loss": loss, "logits": logits} | gradients)
    padded, unpadded = results
    assert padded.keys() == unpadded.keys()
    for name, value in padded.items():
        assert (unpadded[name] - value).norm() <= 1e-4 * value.norm() + 1e-6, name


AttentionInterface.register(STAND_IN, stand_in)


def test_a_model_without_flash_attention_keeps_its_own(small, model, monkeypatch):  # noqa: F811
    monkeypatch.setattr(attention, "_flash_here", lambda: "attention_of_no_library")
    network = open_model(model, small["classification"], settings_of("classification"))
    assert attention.attention_of(network) == "sdpa"
    assert not network.base_model._forward_pre_hooks and not network.base_model._forward_hooks
