"""The choice of layers: from the paper's figures, made-up ratios, and gradients of tiny models."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from megatron_detour.analysis.drift import Drift, Measurement
from megatron_detour.analysis.gradients import gradient_shares
from megatron_detour.analysis.layer_choice import propose
from megatron_detour.errors import DetourError
from tests.analysis.twins import write_twin

# arXiv 2605.12438, base: divergence of the detour from the control, and of two controls.
PAPER = [0.140, 0.177, 0.204, 0.176, 0.149, 0.136, 0.118, 0.100, 0.702, 0.636, 0.865, 0.860, 0.852, 0.844, 0.840]
PAPER += [0.989, 0.988, 0.986, 0.984, 0.981, 0.975, 0.969]
NOISE = [0.003, 0.011, 0.011, 0.019, 0.022, 0.019, 0.019, 0.022, 0.605, 0.573, 0.692, 0.691, 0.687, 0.686, 0.684]
NOISE += [0.891, 0.889, 0.888, 0.885, 0.884, 0.880, 0.877]


def drift_of(divergence, noise):
    return Drift((tuple(divergence),), noise and (tuple(noise),), {}, 500, Measurement())


def by_ratio(*ratio):
    return drift_of([0.01 * each for each in ratio], [0.01] * len(ratio)).ratio


def test_the_papers_figures_name_the_papers_layers():
    drift = drift_of(PAPER, NOISE)
    proposal = propose(drift.ratio)
    assert (proposal.first, proposal.last, proposal.freeze) == (0, 7, ("layers.8-21",))
    assert proposal.reason == (
        "layers 0 to 7 drift 4.5 to 47 times as far as two seeds of the control do, the others 1.1 to 1.2 times"
    )
    regions = drift.regions()  # the paper's table, in percent
    for name, own, noise in (("low", 15.0, 1.57), ("mid", 79.97, 65.97), ("deep", 98.16, 88.48), ("all", 62.13, 49.71)):
        assert 100 * regions[name]["divergence"] == pytest.approx(own, abs=0.06)
        assert 100 * regions[name]["noise"] == pytest.approx(noise, abs=0.06)


@pytest.mark.parametrize(
    ("ratio", "needed", "freeze"),
    [
        ((1, 1, 5, 6, 1), (2, 3), ("layers.0-1", "layers.4")),
        ((1, 5, 1.9, 6, 1, 1), (1, 3), ("layers.0", "layers.4-5")),  # crosses a layer just below the threshold
        ((9, 9, 1, 1, 1, 1, 3), (0, 1), ("layers.2-6",)),  # a lone one above the threshold is left out
        ((5, 6, 7), (0, 2), ()),
        ((1.1, 1.2, 1.9), (None, None), ()),
    ],
)
def test_the_range_with_the_largest_excess(ratio, needed, freeze):
    proposal = propose(by_ratio(*ratio))
    assert (proposal.first, proposal.last) == needed and proposal.freeze == freeze
    json.dumps(proposal.to_json(), allow_nan=False)


def test_the_threshold_decides_and_reasons_are_told():
    assert propose(by_ratio(3, 3, 1, 1), threshold=4).freeze == ()
    assert "it may be too short" in propose(by_ratio(3, 3, 1, 1), threshold=4).reason
    assert "all layers: freeze none" in propose(by_ratio(5, 6, 7)).reason
    shares = {"clm": [0.5, 0.3, 0.1, 0.1], "mlm": [0.1, 0.1, 0.4, 0.4]}
    reason = propose(by_ratio(3, 3, 1, 1), shares).reason
    assert reason.endswith("80% of the CLM gradient and 20% of the MLM gradient of all layers (squared norm)")


def test_a_drift_without_ratios_is_refused():
    for drift, why in (
        (drift_of([0.1, 0.2], None), "no noise control"),
        (drift_of([0.1, 0.2], [0.0, 0.1]), "two of the models are the same"),
        (drift_of([0.0, 0.2], [0.1, 0.1]), "two of the models are the same"),
    ):
        with pytest.raises(DetourError, match=why):
            propose(drift.ratio)
    with pytest.raises(DetourError, match="a model with 2 layers"):
        propose(by_ratio(3, 1), {"clm": [0.2, 0.3, 0.5]})


def test_gradients_are_those_of_transformers(tokenizer_folder, tmp_path, corpus):
    """The CLM loss with a causal mask has no counterpart in transformers' encoder; the MLM loss has."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    from megatron_detour.analysis import gradients
    from megatron_detour.objectives import KINDS
    from megatron_detour.tokenizer.vocabulary import load_vocabulary

    folder = write_twin(tmp_path / "model", tokenizer_folder)
    texts = [json.loads(line)["text"] for line in corpus.jsonl.read_text().splitlines()[:12]]
    shares = gradient_shares(folder, texts, max_tokens=60)
    assert shares.keys() == {"clm", "mlm"} and all(each.sum() == pytest.approx(1) for each in shares.values())
    assert not np.allclose(shares["clm"], shares["mlm"], rtol=0.02)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32)
    masking = KINDS["mlm"].for_validation(gradients.MASK_RATE).bind(load_vocabulary(folder))
    for number, text in enumerate(texts):
        ids = np.array(tokenizer(text, truncation=False, verbose=False)["input_ids"][:60])
        found = masking.apply(ids, np.array([len(ids)]), gradients.SEED, np.array([number]))
        labels = torch.from_numpy(found.all_labels())
        logits = network(torch.from_numpy(found.inputs)[None]).logits[0]
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100).backward()
    squares = [
        sum(float(parameter.grad.square().sum()) for parameter in layer.parameters()) for layer in network.model.layers
    ]
    np.testing.assert_allclose(shares["mlm"], np.array(squares) / sum(squares), rtol=1e-3)


def test_gradients_do_not_depend_on_the_batches(tokenizer_folder, tmp_path, corpus, monkeypatch):
    from megatron_detour.analysis import gradients

    folder = write_twin(tmp_path / "model", tokenizer_folder)
    texts = [json.loads(line)["text"] for line in corpus.jsonl.read_text().splitlines()[:12]]
    whole = gradient_shares(folder, texts)
    monkeypatch.setattr(gradients, "MICRO_TOKENS", 100)
    for name, shares in gradient_shares(folder, texts).items():
        np.testing.assert_allclose(shares, whole[name], rtol=1e-3)
    with pytest.raises(DetourError, match="no texts"):
        gradient_shares(folder, [])
