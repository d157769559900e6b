"""Start models in the forms that people have: read, or refused with the true reason, by plan as by the run."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shutil
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from megatron_detour.checkpoint.huggingface import compare_with_transformers, load_model
from megatron_detour.checkpoint.source import Source, StoredWeights
from megatron_detour.config import Model
from megatron_detour.errors import DetourError
from megatron_detour.model.families import FAMILIES, Family, read_shape
from megatron_detour.model.families.base import FULL, SIZE_KEYS, SLIDING
from megatron_detour.plan import Plan
from megatron_detour.preflight import check_model
from megatron_detour.release.decoder import decoder_config, decoder_weights
from megatron_detour.run_directory import start_hash
from tests.models import CONFIG, config_of, tiny
from tests.training.test_zero2 import run_config

OF_THE_TOKENIZER = {"vocab_size": 400, "pad_token_id": 3}  # RoBERTa's positions begin after the padding token's id


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


def flexbert(name: str) -> str:
    return re.sub(r"^model\.layers", "bert.encoder.layers", name).replace("model.", "bert.")


FORMS = {  # how names are changed, and what is told
    "plain": (lambda name: name, None),
    "torch.compile": (lambda name: f"_orig_mod.{name}", None),
    "DistributedDataParallel": (lambda name: f"module.{name}", None),
    "both": (lambda name: f"module._orig_mod.{name}", None),
    "encoder with a head": (lambda name: name.removeprefix("model."), None),
    "FlexBERT": (flexbert, None),
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
        assert compare_with_transformers(source.name, loaded, as_read=True) < 1e-5
        return
    with pytest.raises(DetourError, match=why) as refusal:
        load_model(source, read_shape(source.config(), "tests"))
    assert told == (f"model.start: {refusal.value}",)


PICKLES = {
    "pytorch_model.bin": lambda weights: weights,
    "model.pt": lambda weights: weights,
    "ep0-ba52988-rank0.pt": lambda weights: {
        "state": {
            "model": {f"model.{flexbert(name)}": weight for name, weight in weights.items()},
            "timestamp": {"batch": 52_988, "total_wct": timedelta(hours=20)},
        },
        "rng": [{"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}],
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PICKLES)
def test_pickled_tensors_are_read(start, name, dtype):
    rounded = {name: weight.to(dtype) for name, weight in weights().items()}
    torch.save(PICKLES[name](rounded), start / name)
    assert faults_of(start) == ()
    loaded = load_model(Source(str(start)), read_shape(Source(str(start)).config(), "tests"))
    assert all(torch.equal(p, rounded[name].float()) for name, p in loaded.named_parameters())
    assert compare_with_transformers(start, loaded, as_read=True) < 1e-5


FLEXBERT = {  # what a training file needs to be CONFIG's model
    **{key: CONFIG[key] for key in SIZE_KEYS},
    "vocab_size": 397,  # of which FlexBERT makes a multiple of 8
    **{"attention_layer": "rope", "bert_layer": "prenorm", "mlp_layer": "glu", "embedding_layer": "sans_pos"},
    **{"normalization": "triton_layernorm", "norm_kwargs": {"eps": "1e-5", "bias": False}},
    **{"embed_norm": True, "final_norm": True, "skip_first_prenorm": True, "head_pred_act": "gelu"},
    **{"sliding_window": CONFIG["local_attention"], "global_attn_every_n_layers": 3, "rotary_emb_base": "1.6e5"},
    "local_attn_rotary_emb_base": 10_000.0,
}


def flexbert_start(start: Path, **changes) -> Source:
    (start / "config.json").unlink()
    content = {"max_seq_len": 1024, "model": {"name": "flex_bert", "model_config": FLEXBERT | changes}}
    (start / "modernbert-base.yaml").write_text(yaml.safe_dump(content))
    torch.save(PICKLES["ep0-ba52988-rank0.pt"](weights()), start / "latest-rank0.pt")
    return Source(str(start))


def test_a_flexbert_training_file_stands_for_config_json(start):
    expected = read_shape(CONFIG | {"vocab_size": 400, "max_position_embeddings": 1024}, "tests")
    before = start_hash(str(start))
    source = flexbert_start(start)
    assert read_shape(source.config(), source.name) == expected
    assert faults_of(start) == () and before is None is not start_hash(str(start))
    loaded = load_model(source, expected)
    assert all(torch.equal(p, weights()[name]) for name, p in loaded.named_parameters())
    assert compare_with_transformers(source.name, loaded, as_read=True) < 1e-5


@pytest.mark.parametrize(
    ("change", "layers", "local_theta"),
    [
        ({"sliding_window": -1, "global_attn_every_n_layers": -1}, {FULL}, 10_000.0),
        ({"local_attn_rotary_emb_base": -1}, {FULL, SLIDING}, 160_000.0),
    ],
)
def test_minus_one_turns_a_flexbert_setting_off(start, change, layers, local_theta):
    source = flexbert_start(start, **change)
    shape = read_shape(source.config(), source.name)
    assert ({*shape.layer_types}, shape.local_theta) == (layers, local_theta)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"bert_layer": "postnorm"}, "bert_layer is 'postnorm', but only 'prenorm' is a ModernBERT's"),
        ({"mlp_in_bias": True}, "mlp_in_bias and mlp_out_bias differ"),
        ({"norm_kwargs": {"eps": "small"}}, "eps must be a number above 0"),
        ({"norm_kwargs": 3}, "not a FlexBERT training file"),
        ({"rotary_emb_base": True}, "rotary_emb_base must be a number above 0"),
        ({"sliding_window": None}, "sliding_window must be an integer"),
        ({"hidden_size": "${width}"}, "hidden_size must be an integer"),
        ({"global_attn_every_n_layers": -1}, "global_attn_every_n_layers must be an integer"),
    ],
)
def test_another_flexbert_is_refused(start, change, why):
    flexbert_start(start, **change)
    (fault,) = faults_of(start)
    assert why in fault


def test_a_training_file_is_read_beside_composers_checkpoint_alone(start):
    flexbert_start(start)
    (start / "another.yaml").write_text("{}")
    (fault,) = faults_of(start)
    assert fault.endswith("as the only *.yaml; there are 2")
    (start / "latest-rank0.pt").unlink()
    (fault,) = faults_of(start)
    assert "the folder has no config.json" in fault


def test_weights_under_other_names_are_not_compared_with_themselves(start):
    """An export must open in transformers: only a start model may have other names."""
    model = tiny(vocab_size=400)
    save_file(
        {name.replace("mlp.Wi", "mlp.in"): weight for name, weight in weights().items()}, start / "model.safetensors"
    )
    with pytest.raises(DetourError, match="transformers does not know the names of the weights"):
        compare_with_transformers(start, model)


class RunsCode:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused(start, capsys, zipped):
    content = weights() | {"more": RunsCode()}
    torch.save(content, start / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (fault,) = faults_of(start)
    assert fault.startswith(f"model.start: {start}/pytorch_model.bin: a pickle file that runs code")
    assert "save its weights alone, as model.safetensors" in fault and "run" not in capsys.readouterr().out.split()


def test_a_damaged_pickle_is_a_sentence(start):
    (start / "pytorch_model.bin").write_bytes(b"no weights at all")
    (fault,) = faults_of(start)
    assert fault.endswith("pytorch_model.bin: not a file of weights, or damaged; download or save the model again")


def test_pickles_of_early_torch_are_read(start):
    """Those of most models from before 2020: no zip files."""
    torch.save(weights(), start / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert faults_of(start) == ()
    loaded = load_model(Source(str(start)), read_shape(Source(str(start)).config(), "tests"))
    assert all(torch.equal(p, weights()[name]) for name, p in loaded.named_parameters())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_encoder_without_a_head_gets_a_new_one(start, model_type):
    """As AutoModel saves it: without the head, and without the prefix of names."""
    theirs = tiny(model_type=model_type, **OF_THE_TOKENIZER)
    (start / "config.json").write_text(json.dumps(config_of(model_type, **OF_THE_TOKENIZER)))
    head, prefix = theirs.shape.names_of(("head",)), theirs.shape.layer_prefix.partition(".")[0]
    body = {name: p.detach() for name, p in theirs.named_parameters() if name not in head}
    save_file({name.removeprefix(f"{prefix}."): weight for name, weight in body.items()}, start / "model.safetensors")
    assert faults_of(start) == ()
    source, shape = Source(str(start)), theirs.shape
    loaded = load_model(source, shape, from_start=True)
    assert all(torch.equal(dict(loaded.named_parameters())[name], weight) for name, weight in body.items())
    assert compare_with_transformers(source.name, loaded, headless=True) < 1e-5
    with pytest.raises(DetourError, match=r"the weights have no .*; use a model with a masked-LM head"):
        load_model(source, shape)


@pytest.mark.parametrize("model_type", ["roberta", "camembert", "xlm-roberta"])
def test_positions_that_begin_after_another_padding_token_are_refused(start, model_type):
    described = OF_THE_TOKENIZER | {"pad_token_id": 1}
    model = tiny(model_type=model_type, **described)
    (start / "config.json").write_text(json.dumps(config_of(model_type, **described)))
    save_file({name: p.detach() for name, p in model.named_parameters()}, start / "model.safetensors")
    (fault,) = faults_of(start)
    assert fault.startswith(
        "model.start: positions begin after pad_token_id, 1, but the tokenizer's padding token has id 3"
    )


def test_a_decoder_starts_an_encoder_with_its_window(start):
    """Logits of the causal encoder are those of the ModernBertDecoder that it was read from."""
    encoder = tiny(vocab_size=400)
    (start / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 400}))
    save_file({name: p.detach() for name, p in encoder.named_parameters()}, start / "model.safetensors")
    decoder = start.parent / "decoder"
    shutil.copytree(start, decoder)
    described = decoder_config(CONFIG | {"vocab_size": 400}, encoder.shape, "float32")
    (decoder / "config.json").write_text(json.dumps(described))
    save_file(decoder_weights(dict(encoder.state_dict())), decoder / "model.safetensors")
    source = Source(str(decoder))
    assert faults_of(decoder) == () and source.is_decoder
    shape = read_shape(source.config(), "tests")
    assert shape == encoder.shape
    loaded = load_model(source, shape)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), encoder.parameters(), strict=True))
    assert compare_with_transformers(decoder, loaded, causal=True) < 1e-5


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


@pytest.mark.parametrize(("name", "save"), [("model.safetensors", save_file), ("pytorch_model.bin", torch.save)])
def test_an_index_of_weights_is_followed(start, name, save):
    parts, suffix = dict(enumerate(weights().items())), Path(name).suffix
    index = {name: f"part-{number % 2}{suffix}" for number, (name, _) in parts.items()}
    for half in (0, 1):
        save({n: w for i, (n, w) in parts.items() if i % 2 == half}, start / f"part-{half}{suffix}")
    (start / f"{name}.index.json").write_text(json.dumps({"weight_map": index}))
    assert faults_of(start) == ()
    loaded = load_model(Source(str(start)), read_shape(Source(str(start)).config(), "tests"))
    assert all(torch.equal(p, weights()[name]) for name, p in loaded.named_parameters())


def test_a_folder_without_weights_may_have_them_in_another_format(start):
    (fault,) = faults_of(start)
    assert fault.endswith("or save it with transformers if it is in another format")


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


def changed(start: Path, **given) -> tuple[tuple[str, ...], Family | None]:
    config = dataclasses.replace(run_config(1), model=Model(start=str(start), config=given))
    checked = check_model(config, Plan.from_config(config))
    return checked.faults, checked.shape


@pytest.mark.parametrize("rope", [{}, {"rope_parameters": {kind: {"rope_theta": 1e4} for kind in (FULL, SLIDING)}}])
def test_a_start_models_positions_can_be_changed(start, rope):
    (start / "config.json").write_text(json.dumps(CONFIG | rope | {"vocab_size": 400}))
    save_file(weights(), start / "model.safetensors")
    faults, shape = changed(start, max_position_embeddings=1024, global_rope_theta=5e5, local_attention=32)
    assert faults == ()
    assert (shape.max_positions, shape.global_theta, shape.local_theta, shape.window) == (1024, 5e5, 1e4, 16)


FULL_ROPE, LOCAL_ROPE = {FULL: {"rope_theta": 3e5}}, {SLIDING: {"rope_theta": 2e4}}


@pytest.mark.parametrize(
    ("stored", "given", "thetas"),
    [
        (FULL_ROPE | LOCAL_ROPE, {"rope_parameters": {FULL: {"rope_theta": 1e6}}}, (1e6, 2e4)),
        (FULL_ROPE | LOCAL_ROPE, {"rope_parameters": None}, (3e5, 2e4)),
        (FULL_ROPE | LOCAL_ROPE, {"local_rope_theta": 5e4}, (3e5, 5e4)),
        (None, {"rope_parameters": {FULL: {"rope_theta": 1e6}}}, (1e6, 7e4)),
    ],
)
def test_one_theta_can_be_changed_alone(start, stored, given, thetas):
    old = {"rope_parameters": stored} if stored else {"global_rope_theta": 8e4, "local_rope_theta": 7e4}
    (start / "config.json").write_text(json.dumps(CONFIG | old | {"vocab_size": 400}))
    save_file(weights(), start / "model.safetensors")
    faults, shape = changed(start, **given)
    assert faults == () and (shape.global_theta, shape.local_theta) == thetas


@pytest.mark.parametrize(
    "given",
    [
        {"global_rope_theta": 0},
        {"local_rope_theta": None},
        {"rope_parameters": {FULL: {"theta": 1e6}}},
        {"rope_parameters": {FULL: {"factor": 2.0}}},
        {"rope_parameters": {"rope_theta": 1e6}},
        {"rope_parameters": {FULL: 1e6}},
        {"rope_parameters": [FULL]},
        {"rope_parameters": {FULL: {"rope_theta": 5e5}}, "global_rope_theta": 1e6},
    ],
)
def test_a_theta_that_would_not_be_used_is_refused(start, given):
    (start / "config.json").write_text(
        json.dumps(CONFIG | {"rope_parameters": FULL_ROPE | LOCAL_ROPE, "vocab_size": 400})
    )
    save_file(weights(), start / "model.safetensors")
    ((fault,), _) = changed(start, **given)
    assert fault.startswith("model.config: ")


@pytest.mark.parametrize(
    ("given", "theta"), [({}, 5e4), (None, 5e4), ({"rope_theta": 1e6}, 1e6), ({"theta": 1e6}, None)]
)
def test_euroberts_theta_is_kept_unless_it_is_given(start, given, theta):
    described = config_of("eurobert", vocab_size=400, rope_parameters={"rope_type": "default", "rope_theta": 5e4})
    (start / "config.json").write_text(json.dumps(described))
    save_file(
        {n: p.detach() for n, p in tiny(model_type="eurobert", vocab_size=400).named_parameters()},
        start / "model.safetensors",
    )
    faults, shape = changed(start, rope_parameters=given)
    assert (shape.theta == theta and not faults) if theta else "rope_parameters.theta must be absent" in faults[0]


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "norm_eps", "model_type", "nonsense"])
def test_nothing_else_of_a_start_model_can_be_changed(start, key):
    save_file(weights(), start / "model.safetensors")
    ((fault,), _) = changed(start, **{key: 64})
    assert fault.startswith(f"model.config: {key}: with model.start only max_position_embeddings, ")


def test_a_new_head_must_be_trained_in_a_phase(start):
    head = tiny().shape.names_of(("head",))
    save_file({name: weight for name, weight in weights().items() if name not in head}, start / "model.safetensors")
    config = dataclasses.replace(run_config(1), model=Model(start=str(start)))
    first, second = (dataclasses.replace(config.phases[0], name=name) for name in "ab")
    frozen = tuple(dataclasses.replace(phase, freeze=("head",)) for phase in (first, second))
    one, both = (dataclasses.replace(config, phases=phases) for phases in ((frozen[0], second), frozen))
    assert check_model(one, Plan.from_config(one)).faults == ()
    (fault,) = check_model(both, Plan.from_config(both)).faults
    assert fault.startswith("phases: `head` is frozen in all of them")


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_a_table_of_positions_is_repeated(start, model_type):
    model = tiny(model_type=model_type, **OF_THE_TOKENIZER)
    short, first = model.shape.max_positions, model.shape.first_position
    (start / "config.json").write_text(json.dumps(config_of(model_type, **OF_THE_TOKENIZER)))
    save_file({name: p.detach() for name, p in model.named_parameters()}, start / "model.safetensors")
    faults, shape = changed(start, max_position_embeddings=first + 2 * short + 3)
    assert faults == () and shape.max_positions == 2 * short + 3
    name = f"{model_type}.embeddings.position_embeddings.weight"
    old = dict(model.named_parameters())[name].detach()
    longer = shape.fitted(name, old)
    assert longer.shape == shape.sizes[name] and torch.equal(longer[: len(old)], old)
    assert torch.equal(longer[len(old) : len(old) + short], old[first:]) and torch.equal(longer[-3:], old[first:][:3])
    ((fault,), _) = changed(start, max_position_embeddings=first + short - 1)
    assert fault.startswith("model.config.max_position_embeddings: the model has")
