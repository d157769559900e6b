"""What tools/convert_to_hf.py writes: a folder that transformers opens with equal logits, or nothing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_detour.checkpoint import huggingface, store
from megatron_detour.checkpoint.huggingface import Source
from megatron_detour.errors import DetourError
from megatron_detour.model.families import read_shape
from megatron_detour.model.families.base import FULL, SLIDING
from megatron_detour.release import portable, private
from megatron_detour.release.export import _find, export
from megatron_detour.release.texts import TEXTS, read_texts
from megatron_detour.tokenizer.vocabulary import load_tokenizer, load_vocabulary
from tests.release.made import PHASES, SIZES, make_run

DETOUR, DECAY = PHASES


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("release") / "run", corpus, steps=(0, 4, 6))


@pytest.fixture(scope="module")
def encoder(run) -> Path:
    """The finished run, exported in fp32."""
    exported = export(str(run), str(run.parent / "encoder"), "fp32")
    assert exported.run_state["step"] == 6 and exported.difference < 1e-5
    return run.parent / "encoder"


def test_an_export_needs_no_optimizer_and_refuses_other_damage(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    checkpoint = store.checkpoint_folder(tmp_path / "run" / "checkpoints", 6)
    (checkpoint / "optimizer.safetensors").unlink()
    assert _find(tmp_path / "run") == _find(checkpoint) == checkpoint
    (checkpoint / "config.json").unlink()
    with pytest.raises(DetourError, match="damaged checkpoint"):
        _find(checkpoint)


def test_an_export_over_a_dangling_link_is_refused(run, tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DetourError, match="already exists"):
        export(str(run), str(tmp_path / "out"), "fp32")
    assert (tmp_path / "out").is_symlink()


def test_the_configuration_is_in_both_spellings(encoder):
    config = json.loads((encoder / "config.json").read_text())
    assert config["layer_types"] == [FULL, SLIDING, SLIDING, FULL]
    assert config["rope_parameters"][SLIDING] == {"rope_type": "default", "rope_theta": 10_000.0}
    spelled = ("global_attn_every_n_layers", "global_rope_theta", "local_rope_theta", "local_attention")
    assert [config[key] for key in spelled] == [3, 160_000.0, 10_000.0, 32]
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert config["architectures"] == ["ModernBertForMaskedLM"]
    assert not {"id2label", "_name_or_path"} & config.keys()
    assert len({path.stat().st_mode for path in encoder.iterdir()}) == 1  # whoever may read one may read all


def test_the_tokenizer_is_the_one_of_training_and_keeps_its_mask(encoder, tokenizer_folder):
    from transformers import AutoTokenizer

    described = json.loads((encoder / "tokenizer_config.json").read_text())
    assert described["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert described["model_max_length"] == SIZES["max_position_embeddings"]
    opened = AutoTokenizer.from_pretrained(encoder)
    assert opened.model_max_length == SIZES["max_position_embeddings"]
    ours = load_tokenizer(tokenizer_folder)
    for text in TEXTS[:3]:
        assert opened(text)["input_ids"] == ours.encode(text).ids
    with_space, without = (opened(f"the patient{space}[MASK] today")["input_ids"] for space in (" ", ""))
    assert with_space == without  # the space in front belongs to the mask


@torch.no_grad()
def test_logits_equal_transformers_on_texts_alone_and_padded(encoder):
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder)
    theirs = AutoModelForMaskedLM.from_pretrained(encoder).eval()
    source = Source(str(encoder))
    ours = huggingface.load_model(source, read_shape(source.config(), "tests"))
    batch = tokenizer(list(TEXTS), padding=True, truncation=True, return_tensors="pt")
    padded = theirs(**batch).logits
    lengths = batch["attention_mask"].sum(1).tolist()
    assert min(lengths) < 2 * ours.shape.window < max(lengths)
    for row, ids, length in zip(padded, batch["input_ids"], lengths, strict=True):
        alone = ours.logits(ids[:length], torch.arange(length), (length,))
        assert alone.std() > 0.3
        torch.testing.assert_close(row[:length], alone, rtol=0, atol=1e-5 * float(alone.abs().max()))


def test_bf16_weights_are_compared_as_they_are_written(run, tmp_path):
    exported = export(str(run / "checkpoints" / "step-00000004"), str(tmp_path / "bf16"), "bf16")
    assert exported.difference < 1e-5
    weights = load_file(tmp_path / "bf16" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    store.verify(tmp_path / "bf16")


def test_the_texts_are_what_is_compared(run, tmp_path, monkeypatch):
    seen = []
    honest = huggingface._token_ids

    def watched(folder, texts, longest):
        seen.append(texts)
        return honest(folder, texts, longest)

    monkeypatch.setattr(huggingface, "_token_ids", watched)
    own = tmp_path / "own.txt"
    own.write_text("Une phrase.\n\n  Another one, of the user's.  \n", encoding="utf-8")
    export(str(run), str(tmp_path / "a"), "fp32", text=str(own))
    export(str(run), str(tmp_path / "b"), "fp32")
    assert seen == [("Une phrase.", "Another one, of the user's."), TEXTS]


def test_our_texts_are_shorter_and_longer_than_modernberts_window():
    words = [len(text.split()) for text in TEXTS]  # a word is a token or more
    assert min(words) < 64 and sum(count > 2 * 64 + 1 for count in words) == 2


def test_what_differs_on_texts_alone_is_refused(run, tmp_path, monkeypatch):
    """A model that is wrong where there is padding, which no single document shows."""
    from transformers import ModernBertForMaskedLM

    honest = ModernBertForMaskedLM.forward

    def forgetful(self, input_ids, attention_mask):
        return honest(self, input_ids=input_ids, attention_mask=torch.ones_like(attention_mask))

    monkeypatch.setattr(ModernBertForMaskedLM, "forward", forgetful)
    with pytest.raises(DetourError, match=r"differ from transformers' by \d"):
        export(str(run), str(tmp_path / "out"), "fp32")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_transformers_reads_otherwise_is_refused(run, tmp_path):
    copy = shutil.copytree(run / "checkpoints" / "step-00000006", tmp_path / "step-00000006")
    path = copy / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"additional_special_tokens": ["tablets"]}))
    relist(copy)
    with pytest.raises(DetourError, match=r"transformers' tokenizer produces other ids than tokenizer\.json"):
        export(str(copy), str(tmp_path / "out"), "fp32")
    assert [path.name for path in tmp_path.iterdir()] == [copy.name]


def relist(folder: Path) -> None:
    """Makes the listing of a published folder true again."""
    facts = {path.name: store.file_facts(path) for path in folder.iterdir() if path.name != store.LISTING}
    (folder / store.LISTING).write_text(json.dumps(facts))


def test_a_tokenizer_saved_by_transformers_5_gets_the_class_that_both_know(corpus, tmp_path):
    import dataclasses

    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained(corpus.tokenizer, extra_special_tokens=["[DRUG]"])
    saved.save_pretrained(tmp_path / "tokenizer")
    written = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] != "PreTrainedTokenizerFast"
    other = dataclasses.replace(corpus, tokenizer=tmp_path / "tokenizer")
    export(str(make_run(tmp_path / "run", other, steps=(6,))), str(tmp_path / "out"), "fp32")
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in config
    opened = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert "[DRUG]" in opened.tokenize("some [DRUG] twice") and opened.mask_token == "[MASK]"


PATTERNS = {
    "every third": (FULL, SLIDING, SLIDING, FULL, SLIDING),
    "all global": (FULL, FULL, FULL),
    "the first": (FULL, SLIDING, SLIDING, SLIDING),
    "the last": (SLIDING, SLIDING, FULL),
    "uneven": (FULL, SLIDING, FULL, SLIDING, SLIDING, FULL),
    "none": (SLIDING, SLIDING),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_the_number_of_transformers_4_gives_the_pattern_or_is_none(name):
    pattern = PATTERNS[name]
    config = {"model_type": "modernbert", "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8}
    config |= {"num_attention_heads": 2, "num_hidden_layers": len(pattern), "layer_types": list(pattern)}
    every = read_shape(config, "tests").every_n_layers
    fits = {n for n in range(1, 9) if tuple(SLIDING if i % n else FULL for i in range(len(pattern))) == pattern}
    assert every in fits if fits else every is None
    assert bool(fits) == (name in ("every third", "all global", "the first"))


def test_a_pattern_that_only_5_expresses_stops_4_and_is_told(corpus, tmp_path):
    changes = {"layer_types": [FULL, FULL, SLIDING, SLIDING]}
    exported = export(
        str(make_run(tmp_path / "run", corpus, steps=(6,), changes=changes)), str(tmp_path / "out"), "fp32"
    )
    assert any("transformers 4 does not support this pattern" in warning for warning in exported.warnings)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["global_attn_every_n_layers"] is None and config["layer_types"] == changes["layer_types"]
    assert "| transformers 5.0 and later |" in (tmp_path / "out" / "README.md").read_text()


@torch.no_grad()
def test_the_decoder_is_the_causal_model_of_training(run, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    exported = export(str(run / "checkpoints" / "step-00000004"), str(tmp_path / "decoder"), "fp32", as_decoder=True)
    assert exported.difference < 1e-5
    assert not any("not causal" in warning for warning in exported.warnings)
    config = json.loads((tmp_path / "decoder" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("modernbert-decoder", ["ModernBertDecoderForCausalLM"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder").eval()
    assert model.config.sliding_window == SIZES["local_attention"] // 2 + 1
    source = Source(str(run / "checkpoints" / "step-00000004"))
    ours = huggingface.load_model(source, read_shape(source.config(), "tests"))
    ids = AutoTokenizer.from_pretrained(tmp_path / "decoder")(TEXTS[3], return_tensors="pt").input_ids[:, :300]
    assert ids.shape[1] > 4 * ours.shape.window
    expected = ours.logits(ids[0], torch.arange(300), (300,), causal=True)
    torch.testing.assert_close(model(input_ids=ids).logits[0], expected, rtol=0, atol=1e-4)
    card = (tmp_path / "decoder" / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card and "ModernBertDecoder" in card


def test_a_decoder_of_an_mlm_phase_is_warned_of(run, tmp_path):
    exported = export(str(run), str(tmp_path / "decoder"), "bf16", as_decoder=True)
    assert any("'decay', was not causal" in warning for warning in exported.warnings)
    assert "were not causal" in (tmp_path / "decoder" / "README.md").read_text()


def test_a_decoder_that_computes_something_else_is_refused(run, tmp_path, monkeypatch):
    from megatron_detour.release import decoder

    honest = decoder.decoder_config

    def one_key_shorter(config, shape, dtype):
        return honest(config, shape, dtype) | {"local_attention": 2 * shape.window}

    monkeypatch.setattr(decoder, "decoder_config", one_key_shorter)
    with pytest.raises(DetourError, match="differ from transformers'"):
        export(str(run / "checkpoints" / "step-00000004"), str(tmp_path / "out"), "fp32", as_decoder=True)
    assert not list(tmp_path.iterdir())


def test_one_theta_for_all_layers_opens_in_4_as_a_decoder_too(corpus, tmp_path):
    changes = {"rope_parameters": {kind: {"rope_type": "default", "rope_theta": 5e4} for kind in (FULL, SLIDING)}}
    run = make_run(tmp_path / "run", corpus, steps=(4,), changes=changes)
    export(str(run), str(tmp_path / "alike"), "fp32", as_decoder=True)
    config = json.loads((tmp_path / "alike" / "config.json").read_text())
    assert config["global_rope_theta"] == config["local_rope_theta"] == 5e4
    assert "transformers 4.54 and later" in (tmp_path / "alike" / "README.md").read_text()
    other = make_run(tmp_path / "other", corpus, steps=(4,))
    exported = export(str(other), str(tmp_path / "unlike"), "fp32", as_decoder=True)
    assert json.loads((tmp_path / "unlike" / "config.json").read_text())["global_rope_theta"] is None
    assert any("opens in 5 only" in warning for warning in exported.warnings)


@pytest.mark.parametrize("damage", ["tokenizer", "weights", "state"])
def test_half_a_checkpoint_is_refused(run, tmp_path, damage):
    file = {"tokenizer": "tokenizer.json", "weights": "model.safetensors", "state": "run_state.json"}[damage]
    copy = shutil.copytree(run / "checkpoints" / "step-00000006", tmp_path / "half")
    (copy / file).unlink()
    with pytest.raises(DetourError, match=rf"damaged checkpoint: .*{file} is missing"):
        export(str(copy), str(tmp_path / "out"), "fp32")
    assert not (tmp_path / "out").exists()


def test_wrong_places_are_told_in_a_sentence(run, encoder, tmp_path):
    (tmp_path / "empty").mkdir()
    for checkpoint, output, told in [
        (tmp_path / "nowhere", tmp_path / "out", "nowhere: no such folder"),
        (tmp_path / "empty", tmp_path / "out", "neither a checkpoint nor a run directory"),
        (encoder, tmp_path / "out", "neither a checkpoint nor a run directory"),
        (run, encoder, "already exists; choose another --output"),
    ]:
        with pytest.raises(DetourError, match=told):
            export(str(checkpoint), str(output), "fp32")
    for name, content, told in [
        ("empty.txt", b"\n \n", "empty; write one document per line"),
        ("latin.txt", "œdème".encode("utf-16"), "not UTF-8 text"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DetourError, match=told):
            read_texts(str(tmp_path / name))
    with pytest.raises(DetourError, match=r"no\.txt: cannot be read: No such file"):
        read_texts(str(tmp_path / "no.txt"))


PRIVATE = {
    "auto_map": {"AutoModel": "code.Model"},
    "_name_or_path": "/home/anna/model",
    "internal": {"host": "gpu7.hospital.example", "api_key": "x"},
}


def test_only_known_keys_come_from_the_start_into_checkpoints_and_releases(run, tmp_path, tokenizer_folder):
    source = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_folder, source)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        content = json.loads((source / name).read_text()) if (source / name).exists() else {}
        content |= {"pad_token": "[PAD]", "name_or_path": "/home/anna/t", "custom": "/data/x/y", **PRIVATE}
        (source / name).write_text(json.dumps(content))
    (tmp_path / "made").mkdir()
    config = Source(str(run / "checkpoints" / "step-00000006")).config() | PRIVATE
    vocabulary = load_vocabulary(tokenizer_folder)
    huggingface.write_model(tmp_path / "made", config, Source(str(source)), vocabulary, {"a": torch.zeros(1)})
    for name in ("config.json", "tokenizer_config.json", "special_tokens_map.json"):
        text = (tmp_path / "made" / name).read_text()
        assert not {*PRIVATE, "name_or_path", "custom"} & json.loads(text).keys()
        assert "anna" not in text and "hospital" not in text
    assert not PRIVATE.keys() & portable.encoder_config(config, read_shape(config, "tests"), "float32").keys()


@pytest.mark.parametrize(
    ("content", "place", "kind"),
    [
        ({"pad_token": "/home/anna/pad"}, "pad_token", "a path"),
        ({"a": [{"b": "C:\\\\Users\\\\anna\\\\x"}]}, r"a\[0\]\.b", "a path"),
        ({"a": "~/models/x"}, "a", "a path"),
        ({"a": "https://git.hospital.example/x"}, "a", "an address"),
        ({"a": "anna@hospital.example"}, "a", "an address"),
        ({"api_key": "1"}, "api_key", "a secret"),
        ({"a": "hf_abcdefghijklmnopqrst"}, "a", "a secret"),
        ({"/home/anna/x": 1}, "the top level", "a path"),
        ({"a": "made on node-0017"}, "a", "the name of this host"),
        ({"a": "by annasmith, 2026"}, "a", "the name of a user"),
        ({"a": "/annasmith"}, "a", "the name of a user"),
        ({"added_tokens": [{"content": "hf_abcdefghijklmnopqrst"}]}, r"added_tokens\[0\]\.content", "a secret"),
    ],
)
def test_what_is_private_in_a_json_file_is_told_without_its_value(content, place, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(private.socket, "gethostname", lambda: "node-0017")
    monkeypatch.setattr(private.getpass, "getuser", lambda: "annasmith")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content).replace("\\\\\\\\", "\\\\"))
    with pytest.raises(DetourError, match=rf"^tokenizer_config\.json: {place} contains {kind}, which") as fault:
        private.refuse_private(tmp_path)
    assert not any(
        str(value) in str(fault.value) for value in content.values() if isinstance(value, str) and len(value) > 3
    )


WORDS = (
    r"\s\S",
    "\\r\\n",
    r"\d\w+",
    "/a/",
    "http://",
    "|||EMAIL_ADDRESS|||",
    "[unused1]",
    "</s>",
    "//",
    "a@b.c",
    "~/a",
)


@pytest.mark.parametrize("text", WORDS)
def test_what_a_tokenizer_looks_for_is_not_taken_for_private(text, tmp_path):
    """A token, and a rule's pattern of each kind with what it puts there."""
    rules = [{"type": "Replace", "pattern": {kind: text}, "content": text} for kind in ("Regex", "String")]
    content = {"added_tokens": [{"id": 1, "content": text}], "model": {"vocab": {"/home/a/b": 1}}}
    named = {"added_tokens_decoder": {"1": {"content": text}}, "additional_special_tokens": [text]}
    content |= {"normalizer": {"type": "Sequence", "normalizers": rules}, "pre_tokenizer": rules[0]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    private.refuse_private(tmp_path)


@pytest.mark.parametrize("name", ["default", "left", "right", "gelu", "bert"])
def test_users_and_hosts_named_like_a_setting_stop_no_release(name, encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("LOGNAME", name)
    monkeypatch.setattr(private.socket, "gethostname", lambda: name)
    settings = {"rope_type": "default", "padding_side": "left", "truncation_side": "right", "model_type": "bert"}
    settings |= {"hidden_activation": "gelu", "tokenizer_class": "BertTokenizer", "kinds": ["bert-base"]}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    private.refuse_private(tmp_path)
    private.refuse_private(encoder)


def test_a_release_with_a_private_value_is_not_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr(private, "_KINDS", {"a path": re.compile("")})
    with pytest.raises(DetourError, match=r"^tokenizer\.json: .* contains a path"):
        export(str(run), str(tmp_path / "model"), "fp32")
    assert not list(tmp_path.iterdir())
