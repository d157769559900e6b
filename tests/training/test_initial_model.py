"""Where a run's model and tokenizer come from: folders, and a hub that is never asked unless it may be."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import save_file

from megatron_detour.checkpoint import source
from megatron_detour.config import Model, RunConfig
from megatron_detour.errors import DetourError
from megatron_detour.model.families import FAMILIES
from megatron_detour.objectives import MaskedLM
from megatron_detour.plan import Plan
from megatron_detour.preflight import check_model
from megatron_detour.tokenizer import vocabulary
from megatron_detour.tokenizer.word_boundaries import Words
from megatron_detour.training.initial_model import InitialModel
from tests.models import CONFIG, tiny
from tests.training.test_zero2 import run_config

SIZES = {key: CONFIG[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}


def config_with(**model):
    return dataclasses.replace(run_config(1), model=Model(**model))


def started(config: RunConfig) -> InitialModel:
    return InitialModel.from_preflight(check_model(config, Plan.from_config(config)))


@pytest.fixture
def hub(tokenizer_folder, tmp_path, monkeypatch) -> list[tuple[str, bool]]:
    """A hub of one repository, org/model; returns what was asked of it: (file, whether a download was allowed)."""
    files = tmp_path / "hub"
    shutil.copytree(tokenizer_folder, files)
    size = vocabulary.load_vocabulary(tokenizer_folder).size
    (files / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": size}))
    weights = {name: parameter.detach() for name, parameter in tiny(vocab_size=size).named_parameters()}
    save_file(weights, files / "model.safetensors")
    asked: list[tuple[str, bool]] = []

    def hub_file(name: str, file: str, download: bool, what: str) -> Path:
        asked.append((file, download))
        if name != "org/model" or not (files / file).is_file():
            raise DetourError(f"{name}: no {file}")
        return files / file

    monkeypatch.setattr(vocabulary, "hub_file", hub_file)
    monkeypatch.setattr(source, "hub_file", hub_file)
    return asked


def test_a_hub_id_is_fetched_only_when_allowed(hub):
    start = started(config_with(start="org/model", download=True))
    assert start.weights.download and start.weights.has("model.safetensors")
    assert not start.tokenizer.download and start.checked.vocabulary.mask is not None
    small = [allowed for file, allowed in hub if not file.startswith("model.safetensors")]
    assert small and all(small)
    hub.clear()
    started(config_with(start="org/model"))
    assert hub and {allowed for _, allowed in hub} == {False}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_model_is_planned_as_it_is_built(family, tokenizer_folder, tmp_path):
    """RoBERTa-style positions begin after the padding token's id, which is the tokenizer's."""
    shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    settings = tmp_path / "tokenizer" / "tokenizer_config.json"
    content = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())
    late = next(token["content"] for token in content["added_tokens"] if token["id"] > 1)
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"pad_token": late}))
    config = config_with(config={**SIZES, "model_type": family}, tokenizer=str(tmp_path / "tokenizer"))
    planned = check_model(config, Plan.from_config(config))
    assert planned.vocabulary.pad > 1 and started(config).shape == planned.shape


def test_special_ids_that_a_start_model_leaves_open_are_the_tokenizers(hub, tokenizer_folder, tmp_path):
    path = tmp_path / "hub" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": None, "eos_token_id": None}))
    start = started(config_with(start=str(path.parent)))
    expected = start.checked.vocabulary.pad, start.checked.vocabulary.sep
    assert (start.config["pad_token_id"], start.config["eos_token_id"]) == expected


def test_another_tokenizer_than_the_models_is_refused(hub, tokenizer_folder, tmp_path):
    other = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    other["normalizer"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(DetourError, match="is not the tokenizer that org/model was trained with"):
        started(config_with(start="org/model", tokenizer=str(tmp_path / "tokenizer.json")))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"hidden_size": "abc"}, r"model\.config: "),
        ({"hiden_size": 64}, r"model\.config\.hiden_size: .*'hidden_size'"),
        ({"vocab_size": 100}, "use the model's own tokenizer"),
        ({"max_position_embeddings": 8}, r"data\.sequence_length: 50 exceeds"),
        ({"hidden_act": "relu", "hidden_activation": "relu"}, r"hidden_act"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(tokenizer_folder, config, told):
    with pytest.raises(DetourError, match=told):
        started(config_with(config=config, tokenizer=str(tokenizer_folder)))


def test_words_are_there_for_phases_that_mask_them(hub, tokenizer_folder):
    config = config_with(start="org/model")
    assert started(config).checked.words is None
    last = dataclasses.replace(config.phases[-1], objective=MaskedLM(0.3, whole_word_masking=True))
    words = started(dataclasses.replace(config, phases=(*config.phases[:-1], last))).checked.words
    expected = Words.from_file(tokenizer_folder / "tokenizer.json", vocabulary.load_vocabulary(tokenizer_folder))
    assert (words.continues == expected.continues).all()
    assert (words.is_open == expected.is_open).all()
