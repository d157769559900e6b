"""An exported folder, and one that transformers saved, are start models as they are."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from megatron_detour.checkpoint import huggingface
from megatron_detour.checkpoint.huggingface import Source, Weights, load_model
from megatron_detour.config import Model
from megatron_detour.model.families import read_shape
from megatron_detour.model.language_model import LanguageModel
from megatron_detour.parallel.state import ParallelState
from megatron_detour.plan import Plan
from megatron_detour.preflight import check_model
from megatron_detour.release.export import export
from megatron_detour.training.initial_model import InitialModel
from tests.release.made import make_run, scaled_weights
from tests.training.test_zero2 import run_config

pytestmark = pytest.mark.integration


def started(folder: Path) -> LanguageModel:
    """The model that a run with `model.start` of this folder begins with, compared with transformers as there."""
    config = dataclasses.replace(run_config(1), model=Model(start=str(folder)))
    start = InitialModel.from_preflight(check_model(config, Plan.from_config(config)))
    model = start.shape.build(ParallelState())
    with Weights(start.weights) as weights:
        weights.check(start.shape)
        model.load_state_dict({name: weights(name) for name in start.shape.sizes})
    assert huggingface.compare_with_transformers(folder, model.eval()) < 1e-5
    return model


@pytest.fixture(scope="module")
def encoder(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("back")
    export(str(make_run(folder / "run", corpus, steps=(6,))), str(folder / "encoder"), "fp32")
    return folder / "encoder"


def test_an_exported_folder_is_a_start_model(encoder, corpus):
    found = started(encoder).state_dict()
    for name, weight in scaled_weights(corpus.tokenizer).items():
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_transformers_saves_is_a_start_model(encoder, tmp_path, dtype):
    """In shards, without decoder.weight, which is the embedding."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    theirs = AutoModelForMaskedLM.from_pretrained(encoder, dtype=dtype)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1 and "decoder.weight" not in index["weight_map"]
    found = started(tmp_path).state_dict()
    for name, weight in theirs.float().state_dict().items():
        assert name == "decoder.weight" or torch.equal(found[name], weight), name


def test_an_exported_decoder_is_a_start_model(corpus, tmp_path):
    run = make_run(tmp_path / "run", corpus, steps=(4,))
    export(str(run), str(tmp_path / "decoder"), "fp32", as_decoder=True)
    export(str(run), str(tmp_path / "encoder"), "fp32")
    decoder, encoder = (Source(str(tmp_path / name)) for name in ("decoder", "encoder"))
    shape = read_shape(decoder.config(), "decoder")
    assert shape == read_shape(encoder.config(), "encoder")
    ours, same = (load_model(source, shape).state_dict() for source in (decoder, encoder))
    assert all(torch.equal(same[name], weight) for name, weight in ours.items())
