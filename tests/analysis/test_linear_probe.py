"""Linear probes: scikit-learn's scores, on data that a test writes."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from megatron_detour.analysis.hidden_states import Encoder, first_pool, mean_states
from megatron_detour.analysis.linear_probe import ProbeOptions, probe, probe_layers
from megatron_detour.errors import DetourError
from megatron_detour.evaluation.task import load_task
from tests.analysis.twins import write_twin
from tests.evaluation.small_tasks import write_small_tasks


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_small_tasks(folder)
    return folder


@pytest.fixture(scope="module")
def task(data):
    return load_task(str(data / "small_classification.yaml"))


@pytest.fixture(scope="module")
def model(tokenizer_folder, tmp_path_factory):
    return write_twin(tmp_path_factory.mktemp("models") / "model", tokenizer_folder)


def lines(data, split):
    text = (data / "small_classification" / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def splits(data):
    """Texts and labels by split; the test split is compressed."""
    import gzip

    found = {split: lines(data, split) for split in ("train", "dev")}
    test = gzip.decompress((data / "small_classification" / "test.jsonl.gz").read_bytes()).decode()
    found["test"] = [json.loads(line) for line in test.splitlines()]
    return {name: ([e["text"] for e in split], [e["label"] for e in split]) for name, split in found.items()}


def test_scores_are_those_of_scikit_learn(model, task, data, splits):
    """One C, so that nothing is chosen on dev."""
    result = probe_layers(model, task, data, ProbeOptions(strengths=(0.1,)))
    x, test = (mean_states(model, splits[name][0]) for name in ("train", "test"))
    for layer in range(5):
        reference = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
        reference.fit(x[layer].astype(np.float32).astype(np.float64), splits["train"][1])
        predicted = reference.predict(test[layer])
        assert result.scores[layer] == (pytest.approx(f1_score(splits["test"][1], predicted, average="macro")),)
    assert result.metric == "macro_f1" and result.layers == (0, 1, 2, 3, 4) and result.unconverged == 0
    assert result.examples == {"train": 60, "dev": 20, "test": 20}
    assert result.mean.max() > result.baseline + 0.2  # a word decides, whose embedding the model has
    json.dumps(result.to_json(), allow_nan=False)


def test_the_strength_is_chosen_on_dev(model, task, data, splits):
    strengths = (0.0001, 0.01, 1.0)
    result = probe_layers(model, task, data, ProbeOptions(strengths=strengths[::-1]), layers=[2])
    x, dev = (mean_states(model, splits[name][0])[2] for name in ("train", "dev"))
    scores = {}
    for c in strengths:
        fitted = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000)).fit(x, splits["train"][1])
        scores[c] = f1_score(splits["dev"][1], fitted.predict(dev), average="macro")
    assert result.strengths == ((max(scores, key=scores.__getitem__),),)


def test_one_layer_counts_from_the_end_and_pooling_matters(model, task, data, splits):
    options = ProbeOptions(pooling="cls", strengths=(0.1,))
    whole = probe_layers(model, task, data, options)
    assert probe(model, task, data, options) == whole.mean[4]
    assert probe(model, task, data, options, layer=1) == whole.mean[1]
    encoder = Encoder.open(model)
    x, test = (
        encoder.states(encoder.tokenize(splits[name][0], 512), first_pool, layers=[1])[0] for name in ("train", "test")
    )
    fitted = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(x, splits["train"][1])
    assert whole.mean[1] == pytest.approx(f1_score(splits["test"][1], fitted.predict(test), average="macro"))
    with pytest.raises(DetourError, match="no layer 5; it has layers 0 to 4"):
        probe(model, task, data, layer=5)


def test_seeds_draw_training_examples(model, task, data, splits):
    options = ProbeOptions(seeds=(1, 2, 3), train_examples=25, dev_examples=10, strengths=(0.1,))
    result = probe_layers(model, task, data, options, layers=[3])
    assert result.seeds == (1, 2, 3) and len(result.scores[0]) == 3 and result.examples["train"] == 25
    x, test = (mean_states(model, splits[name][0])[3] for name in ("train", "test"))
    for seed, score in zip(result.seeds, result.scores[0], strict=True):
        rows = sorted(random.Random(seed).sample(range(60), 25))
        fitted = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
        fitted.fit(x[rows], [splits["train"][1][i] for i in rows])
        assert score == pytest.approx(f1_score(splits["test"][1], fitted.predict(test), average="macro"))
    assert probe_layers(model, task, data, ProbeOptions(seeds=(1, 2)), layers=[3]).seeds == (1,)  # nothing to draw


def test_other_tasks_and_one_label_are_refused(model, task, data):
    with pytest.raises(DetourError, match="needs a task of type classification, not similarity"):
        probe(model, load_task(str(data / "small_similarity.yaml")), data)
    with pytest.raises(DetourError, match="one label; raise --train-examples"):
        probe(model, task, data, ProbeOptions(train_examples=1))
