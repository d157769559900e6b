"""Transplants: what moves, what stays, to the bit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_detour.analysis.transplants import names_of, transplant
from megatron_detour.checkpoint import store
from megatron_detour.errors import DetourError
from megatron_detour.model.families import read_shape
from tests.analysis.twins import write_twin
from tests.models import CONFIG, config_of

SHAPE = read_shape(CONFIG, "tests")


@pytest.fixture
def twins(tokenizer_folder, tmp_path):
    """Two models of which no weight is equal."""
    folders = [
        write_twin(tmp_path / name, tokenizer_folder, seed=seed) for name, seed in (("donor", 3), ("recipient", 4))
    ]
    weights = load_file(folders[1] / "model.safetensors")
    changed = {name: weight + 0.125 for name, weight in weights.items()}
    save_file(changed, folders[1] / "model.safetensors", metadata={"format": "pt"})
    return folders


def content(folder):
    return (folder / "model.safetensors").read_bytes()


def test_all_is_the_donor_and_nothing_the_recipient_to_the_bit(twins, tmp_path):
    donor, recipient = twins
    assert content(donor) != content(recipient)
    whole = transplant(donor, recipient, ["layers.0-4", "embeddings", "final_norm", "head"], tmp_path / "whole")
    assert content(tmp_path / "whole") == content(donor) and whole.parameters == whole.total
    transplant(donor, recipient, ["all"], tmp_path / "all")
    assert content(tmp_path / "all") == content(donor)
    nothing = transplant(donor, recipient, [], tmp_path / "nothing")
    assert content(tmp_path / "nothing") == content(recipient) and nothing.parameters == 0
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "all" / name).read_bytes() == (recipient / name).read_bytes()


@pytest.mark.parametrize(
    ("parts", "moves"),
    [
        (["layers.1-2"], lambda name: name.startswith(("model.layers.1.", "model.layers.2."))),
        (["low"], lambda name: name.startswith(("model.layers.0.", "model.layers.1."))),
        (["deep"], lambda name: name.startswith("model.layers.4.")),
        (["attention"], lambda name: ".attn." in name),
        (["mlp"], lambda name: ".mlp." in name),
        (["layers.3", "embeddings"], lambda name: name.startswith(("model.layers.3.", "model.embeddings."))),
        (["head"], lambda name: name.startswith(("head.", "decoder."))),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_the_named_parts_move_and_no_others(parts, moves, twins, tmp_path):
    donor, recipient = (load_file(folder / "model.safetensors") for folder in twins)
    result = transplant(*twins, parts, tmp_path / "new")
    found = load_file(tmp_path / "new" / "model.safetensors")
    assert found.keys() == recipient.keys()
    moved = {name for name in found if torch.equal(found[name], donor[name])}
    assert moved == set(result.weights) == {name for name in found if moves(name)} != set()
    assert all(torch.equal(found[name], recipient[name]) for name in found.keys() - moved)
    assert result.parameters == sum(found[name].numel() for name in moved)
    record = json.loads((tmp_path / "new" / "transplant.json").read_text())
    assert record["parts"] == parts and record["parameters"] == result.parameters


def test_it_opens_in_transformers_and_is_listed(twins, tmp_path):
    from transformers import AutoModelForMaskedLM

    donor, recipient = twins
    transplant(donor, recipient, ["mid"], tmp_path / "new")
    store.verify(tmp_path / "new")
    _, loading = AutoModelForMaskedLM.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]


def test_a_checkpoint_of_bf16_keeps_its_bits(twins, tmp_path):
    for folder in twins:
        weights = {name: weight.bfloat16() for name, weight in load_file(folder / "model.safetensors").items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    transplant(*twins, ["all"], tmp_path / "new")
    assert content(tmp_path / "new") == content(twins[0])


def test_thirds_and_layers_are_parts_of_the_model():
    assert names_of(SHAPE, ["low", "mid", "deep"]) == names_of(SHAPE, ["layers.0-4"])
    assert names_of(SHAPE, ["all"]) == set(SHAPE.weights)
    assert names_of(SHAPE, ["attention", "mlp"]) < names_of(SHAPE, ["layers.0-4"])  # the norms are of neither
    for part, why in (
        ("layers.5", "5 layers, 0 to 4"),
        ("layers.3-9", "5 layers, 0 to 4"),
        ("atention", "no part of a model"),
    ):
        with pytest.raises(DetourError, match=why):
            names_of(SHAPE, [part])


@pytest.mark.parametrize(
    ("part", "config", "why"),
    [
        ("final_norm", config_of("bert"), "final_norm: this BERT has no such part; its parts are embeddings, head and"),
        (
            "head",
            config_of("eurobert", tie_word_embeddings=True),
            "head: this EuroBERT has no such part; its parts are embeddings, final_norm and layers",
        ),
        ("deep", CONFIG | {"num_hidden_layers": 2}, "deep: the model has no such third, but 2 layers"),
    ],
)
def test_a_part_without_weights_is_refused(part, config, why):
    with pytest.raises(DetourError, match=why):
        names_of(read_shape(config, "tests"), [part])


def test_models_that_are_no_twins_are_refused_and_nothing_is_written(twins, tokenizer_folder, tmp_path):
    donor, recipient = twins
    wide = write_twin(tmp_path / "wide", tokenizer_folder, intermediate_size=64)
    halved, renamed, retokenized = (shutil.copytree(donor, tmp_path / name) for name in ("half", "name", "token"))
    weights = load_file(donor / "model.safetensors")
    save_file({name: weight.bfloat16() for name, weight in weights.items()}, halved / "model.safetensors")
    weights["decoder.extra"] = weights.pop("decoder.bias")
    save_file(weights, renamed / "model.safetensors")
    (retokenized / "tokenizer.json").write_text((donor / "tokenizer.json").read_text() + " ")
    for other, why in (
        (wide, "differ in intermediate"),
        (halved, "bfloat16 and float32; export both"),
        (renamed, "only one of them has decoder"),
        (retokenized, "other tokenizers"),
    ):
        with pytest.raises(DetourError, match=why):
            transplant(other, recipient, ["low"], tmp_path / "new")
    with pytest.raises(DetourError, match="already exists"):
        transplant(donor, recipient, ["low"], recipient)
    assert not (tmp_path / "new").exists()
    (donor / "model.safetensors").write_bytes(content(donor)[:-100])
    with pytest.raises(DetourError, match=r"model\.safetensors"):
        transplant(donor, recipient, ["low"], tmp_path / "new")
    assert not (tmp_path / "new").exists()
