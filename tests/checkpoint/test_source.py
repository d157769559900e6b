"""Start models in the forms that people have: read, or refused with the true reason, by plan as by the run."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_detour.checkpoint.huggingface import load_model
from megatron_detour.checkpoint.source import Source, StoredWeights
from megatron_detour.config import Model
from megatron_detour.errors import DetourError
from megatron_detour.model.families import read_shape
from megatron_detour.plan import Plan
from megatron_detour.preflight import check_model
from tests.models import CONFIG, tiny
from tests.training.test_zero2 import run_config


@pytest.fixture
def start(tmp_path, tokenizer_folder) -> Path:
    """A folder with all but weights."""
    folder = tmp_path / "start"
    shutil.copytree(tokenizer_folder, folder)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 400}))
    return folder


def faults_of(start: Path) -> tuple[str, ...]:
    config = dataclasses.replace(run_config(1), model=Model(start=str(start)))
    return check_model(config, Plan.from_config(config)).faults


def weights() -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in tiny(vocab_size=400).named_parameters()}


FORMS = {  # how names are changed, and what is told
    "plain": (lambda name: name, None),
    "torch.compile": (lambda name: f"_orig_mod.{name}", None),
    "DistributedDataParallel": (lambda name: f"module.{name}", None),
    "both": (lambda name: f"module._orig_mod.{name}", None),
    "encoder": (lambda name: name.removeprefix("model."), "this encoder has no masked-LM head"),
    "classifier": (
        lambda name: None if name.startswith("decoder") else name,
        "no decoder.bias; use a model with a masked-LM head",
    ),
    "another wrapper": (lambda name: f"net.{name}", r"their names differ \(net\.decoder\.bias, net"),
    "half wrapped": (lambda name: name if "layers" in name else f"module.{name}", "the weights have no "),
    "nothing": (lambda name: None, r"their names differ \(nothing"),
}


@pytest.mark.parametrize("form", FORMS)
def test_plan_and_run_say_the_same_of_a_start_folder(start, form):
    rename, why = FORMS[form]
    renamed = {rename(name): weight for name, weight in weights().items() if rename(name)}
    save_file(renamed, start / "model.safetensors")
    source = Source(str(start))
    told = faults_of(start)
    if why is None:
        assert told == ()
        loaded = load_model(source, read_shape(source.config(), "tests"))
        assert all(torch.equal(p, weights()[name]) for name, p in loaded.named_parameters())
        return
    with pytest.raises(DetourError, match=why) as refusal:
        load_model(source, read_shape(source.config(), "tests"))
    assert told == (f"model.start: {refusal.value}",)


def test_pickled_weights_are_refused_with_the_way_out(start):
    torch.save(weights(), start / "pytorch_model.bin")
    (fault,) = faults_of(start)
    assert "AutoModelForMaskedLM.from_pretrained" in fault and "save_pretrained" in fault


@pytest.mark.parametrize(
    "index",
    [
        *("[]", "null", "{", '{"weight_map": null}', '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000),
        *('{"weight_map": {"a": null}}', '{"weight_map": {"a": ["x"]}}', '{"weight_map": {"a": "../x.safetensors"}}'),
        '{"weight_map": {"a": "gone.safetensors"}}',
    ],
    ids=lambda text: text[:40],
)
def test_a_wrong_index_of_weights_is_a_sentence(start, index):
    (start / "model.safetensors.index.json").write_text(index)
    (fault,) = faults_of(start)
    assert fault.startswith(f"model.start: {start}")


def test_an_index_of_weights_is_followed(start):
    parts = dict(enumerate(weights().items()))
    index = {name: f"part-{number % 2}.safetensors" for number, (name, _) in parts.items()}
    for half in (0, 1):
        save_file({n: w for i, (n, w) in parts.items() if i % 2 == half}, start / f"part-{half}.safetensors")
    (start / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert faults_of(start) == ()


def with_header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


DAMAGED = {
    "empty": b"",
    "text": b"no weights at all",
    "shorter than it says": (10**6).to_bytes(8, "little"),
    "huge": (2**63).to_bytes(8, "little") + b"{}",
    "list": with_header(b"[]"),
    "null": with_header(b'{"a":null}'),
    "cut": with_header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'),
    "negative": with_header(b'{"a":{"shape":[-1],"data_offsets":[0,4]}}') + b"1234",
    "deep": with_header(b"[" * 200_000),
    "not UTF-8": with_header(b"\xff\xfe\xff\xfe"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_of_weights_is_a_sentence(start, kind):
    (start / "model.safetensors").write_bytes(DAMAGED[kind])
    with pytest.raises(DetourError, match=r"model\.safetensors: "):
        StoredWeights.from_source(Source(str(start)))
