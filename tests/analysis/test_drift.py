"""Drift and persistence, end to end on tiny models."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from megatron_detour.analysis.cka import linear_cka
from megatron_detour.analysis.drift import (
    Drift,
    Measurement,
    draw_texts,
    measure_drift,
    thirds,
)
from megatron_detour.analysis.hidden_states import Encoder, first_pool, mean_states
from megatron_detour.analysis.persistence import find_decay, measure_persistence
from megatron_detour.errors import DetourError
from tests.analysis.twins import write_twin
from tests.conftest import sentences, write_jsonl


def divergence(a, b, draws, measurement=None):
    measurement = measurement or Measurement()
    return measurement.divergence(measurement.states(a, draws), measurement.states(b, draws))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    rng = random.Random(5)
    folder = tmp_path_factory.mktemp("texts")
    return write_jsonl(folder / "notes.jsonl", [sentences(rng, rng.randint(1, 6)) for _ in range(60)])


@pytest.fixture(scope="module")
def models(tokenizer_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    noise = {"control": 0.0, "second": 0.02, "detour": 0.2}
    return {name: write_twin(folder / name, tokenizer_folder, noise=size) for name, size in noise.items()}


def test_states_are_the_means_of_transformers(models, texts):
    """One text at a time, without padding; the last layer's from before the final norm."""
    sample = draw_texts(texts, 7, (1,))[0]
    network = AutoModel.from_pretrained(models["control"], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(models["control"])
    before_norm = []
    network.final_norm.register_forward_hook(lambda module, given, output: before_norm.append(given[0]))
    states = mean_states(models["control"], sample, max_tokens=40, batch=3)
    encoder = Encoder.open(models["control"])
    firsts = encoder.states(encoder.tokenize(sample, 40), first_pool, batch=3)
    some = encoder.states(encoder.tokenize(sample, 40), first_pool, batch=3, layers=[4, 1])
    np.testing.assert_array_equal(some, firsts[[4, 1]])
    assert states.shape == (5, 7, 32) and states.dtype == np.float64
    for i, text in enumerate(sample):
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=40)
        with torch.inference_mode():
            hidden = [*network(**ids, output_hidden_states=True).hidden_states[1:-1], before_norm[-1]]
        np.testing.assert_allclose(states[:, i], torch.stack(hidden)[:, 0].double().mean(1), atol=2e-5)
        np.testing.assert_allclose(firsts[:, i], torch.stack(hidden)[:, 0, 0].double(), atol=2e-5)


def test_layers_of_other_encoders_are_found(tokenizer_folder, tmp_path):
    """The layers of a BERT have another place, and its embeddings are no layer."""
    size = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    network = BertModel(BertConfig(vocab_size=400, max_position_embeddings=64, **size))
    for file in tokenizer_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    network.save_pretrained(tmp_path)
    states = mean_states(tmp_path, ["the patient takes metformin today."])
    ids = AutoTokenizer.from_pretrained(tmp_path)("the patient takes metformin today.", return_tensors="pt")
    with torch.inference_mode():
        hidden = network.eval()(**ids, output_hidden_states=True).hidden_states[1:]
    np.testing.assert_allclose(states[:, 0], torch.stack(hidden)[:, 0].double().mean(1), atol=1e-5)


def test_half_precision_is_near(models, texts):
    sample = draw_texts(texts, 5, (1,))[0]
    half, full = (mean_states(models["control"], sample, dtype=dtype) for dtype in ("float16", "float32"))
    assert not np.array_equal(half, full)
    assert np.linalg.norm(half - full) < 0.05 * np.linalg.norm(full)


def test_draws_are_of_documents_and_depend_on_their_numbers_alone(texts, tmp_path):
    first, second = draw_texts(texts, 20, (42, 43))
    documents = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    assert len(first) == 20 and first != second
    places = [documents.index(text) for text in first]
    assert places == sorted(places)
    assert draw_texts([texts], 20, (43,)) == [second]
    assert set(draw_texts(texts, 10, (42,))[0]) <= set(first)
    halves = [write_jsonl(tmp_path / f"{part}.jsonl", documents[part * 30 :][:30]) for part in (0, 1)]
    assert draw_texts(halves, 20, (42,)) == [first]
    with pytest.raises(DetourError, match="60 documents, fewer than the 500"):
        draw_texts(texts)


def test_thirds():
    assert thirds(22) == {"low": range(8), "mid": range(8, 15), "deep": range(15, 22)}
    assert thirds(28) == {"low": range(10), "mid": range(10, 19), "deep": range(19, 28)}
    assert thirds(8) == {"low": range(3), "mid": range(3, 6), "deep": range(6, 8)}
    assert thirds(12) == {"low": range(4), "mid": range(4, 8), "deep": range(8, 12)}
    assert [len(where) for where in thirds(1).values()] == [1, 0, 0]


def test_divergence_is_one_minus_cka_of_the_states(models, texts):
    draws = draw_texts(texts, 12, (42, 43))
    found = divergence(models["detour"], models["control"], draws)
    assert found.shape == (2, 5)
    for row, draw in zip(found, draws, strict=True):
        pair = (mean_states(models[name], draw) for name in ("detour", "control"))
        # Texts are batched otherwise, which changes sums of float32.
        np.testing.assert_allclose(row, [1 - linear_cka(x, y) for x, y in zip(*pair, strict=True)], atol=1e-4)


def test_a_model_does_not_differ_from_itself(models, texts):
    draws = draw_texts(texts, 12, (42,))
    for estimator in ("linear", "debiased"):
        own = divergence(models["control"], models["control"], draws, Measurement(estimator=estimator))
        np.testing.assert_allclose(own, 0, atol=1e-12)


def test_drift_has_noise_and_ratio_by_region(models, texts):
    reported = []
    drift = measure_drift(
        models["detour"],
        models["control"],
        draw_texts(texts, 20, (42, 43, 44)),
        models["second"],
        report=lambda model, count: reported.append(model),
    )
    assert drift.layers == 5 and drift.texts == 20 and set(reported) == {str(path) for path in models.values()}
    np.testing.assert_allclose(drift.ratio, np.mean(drift.detour, 0) / np.mean(drift.noise, 0))
    assert (drift.ratio > 5).all()  # ten times the noise in the weights
    assert (drift.sd > 0).all() and (drift.sd < drift.mean).all()
    regions = drift.regions()
    assert list(regions) == ["low", "mid", "deep", "all"]
    assert regions["low"]["divergence"] == pytest.approx(drift.mean[:2].mean())
    assert regions["deep"]["noise"] == pytest.approx(drift.noise_mean[4])
    assert regions["all"]["ratio"] == pytest.approx(drift.mean.mean() / drift.noise_mean.mean())
    assert Drift.from_json(json.loads(json.dumps(drift.to_json(), allow_nan=False))) == drift


def test_drift_without_a_second_control_has_no_ratio(models, texts):
    drift = measure_drift(models["detour"], models["control"], draw_texts(texts, 12, (42,)))
    assert drift.ratio is None and drift.regions()["low"]["ratio"] is None and np.isnan(drift.sd).all()
    assert Drift.from_json(json.loads(json.dumps(drift.to_json(), allow_nan=False))) == drift


def test_a_ratio_to_no_noise_is_undefined_not_infinite(models, texts):
    drift = measure_drift(models["detour"], models["control"], draw_texts(texts, 12, (42,)), models["control"])
    content = json.loads(json.dumps(drift.to_json(), allow_nan=False))
    assert all(value is None or value > 1e6 for value in content["summary"]["ratio"])


def test_models_of_other_depths_are_refused(models, texts, tokenizer_folder, tmp_path):
    shallow = write_twin(tmp_path / "shallow", tokenizer_folder, num_hidden_layers=3)
    with pytest.raises(DetourError, match="3 and 5 layers"):
        divergence(shallow, models["control"], draw_texts(texts, 12, (42,)))


def test_states_that_are_not_finite_are_refused(texts, tokenizer_folder, tmp_path):
    broken = write_twin(tmp_path / "broken", tokenizer_folder, noise=float("inf"))
    with pytest.raises(DetourError, match="layer 0 are not finite"):
        mean_states(broken, draw_texts(texts, 3, (42,))[0])


def test_persistence_along_checkpoints(models, texts, tmp_path):
    draws = draw_texts(texts, 20, (42, 43))
    found = find_decay([f"200={models['detour']}", f"100={models['second']}"])
    result = measure_persistence(models["control"], found, draws)
    assert result.tokens == (100, 200) and result.checkpoints[0].endswith("second")
    np.testing.assert_allclose(result.divergence[1], divergence(models["detour"], models["control"], draws), atol=1e-9)
    assert result.regions()["all"] == pytest.approx([each.mean() for each in result.mean])
    assert (result.mean[1] > result.mean[0]).all() and result.sd.shape == (2, 5)
    written = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert written["divergence"][1][0] == list(result.divergence[1][0])
    assert written["summary"]["regions"] == result.regions()


def test_checkpoints_tell_their_tokens(tmp_path):
    run = tmp_path / "run"
    for step, tokens in ((2, 4096), (10, 20480)):
        folder = run / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "run_state.json").write_text(json.dumps({"tokens": tokens}))
    (run / "checkpoints" / ".step-00000011.writing-1").mkdir()
    assert [tokens for tokens, _ in find_decay([str(run)])] == [4096, 20480]
    assert find_decay([str(folder)]) == [(20480, folder)]
    for words, why in (
        (str(tmp_path / "no"), "no such folder"),
        (str(run / "checkpoints"), "tokens are unknown; give TOKENS="),
    ):
        with pytest.raises(DetourError, match=why):
            find_decay([words])


def test_results_of_other_kinds_are_refused():
    for content in ({}, {"detour": [[1], [1, 2]], "noise": None}, {"tokens": [1], "divergence": []}):
        with pytest.raises(DetourError, match="not a result of"):
            Drift.from_json(content)
