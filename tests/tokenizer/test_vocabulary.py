"""What training knows of a tokenizer: size, special ids, and a fingerprint of what decides on ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models

from megatron_detour.errors import DetourError
from megatron_detour.tokenizer.vocabulary import (
    Vocabulary,
    find_tokenizer,
    fingerprint,
    load_tokenizer,
    load_vocabulary,
)


@pytest.fixture
def tokenizer(tokenizer_folder) -> Tokenizer:
    return Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))


def word_level(words: dict[str, int]) -> Tokenizer:
    return Tokenizer(models.WordLevel(words, unk_token="<unk>"))


def test_the_tiny_tokenizer(tokenizer):
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    assert vocabulary.size == 400
    ids = [tokenizer.token_to_id(name) for name in ("[MASK]", "[PAD]", "[CLS]", "[SEP]", "[UNK]")]
    assert [vocabulary.mask, vocabulary.pad, vocabulary.cls, vocabulary.sep, vocabulary.unk] == ids
    assert vocabulary.special_ids == tuple(sorted(ids))


def test_special_and_ordinary_ids_share_out_the_vocabulary(tokenizer):
    tokenizer.add_special_tokens(["[X]"])
    tokenizer.add_tokens([AddedToken("ordinary", special=False)])
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    assert vocabulary.size == 402
    special, ordinary = vocabulary.special(), vocabulary.ordinary()
    assert special.shape == (402,)
    assert set(special.nonzero()[0].tolist()) == set(vocabulary.special_ids)
    assert tokenizer.token_to_id("[X]") in vocabulary.special_ids
    assert tokenizer.token_to_id("ordinary") in ordinary
    assert sorted([*ordinary.tolist(), *vocabulary.special_ids]) == list(range(402))


def test_the_size_is_one_more_than_the_greatest_id():
    assert Vocabulary.from_tokenizer(word_level({"<unk>": 0, "a": 7})).size == 8


def test_roles_fall_back_to_robertas_names_and_may_be_absent():
    vocabulary = Vocabulary.from_tokenizer(word_level({"a": 0, "<unk>": 1, "<s>": 2, "</s>": 3, "<mask>": 4}))
    assert (vocabulary.cls, vocabulary.sep, vocabulary.unk, vocabulary.mask, vocabulary.pad) == (2, 3, 1, 4, None)
    assert vocabulary.special_ids == (1, 2, 3, 4)  # by their role, though nothing marks them as special


def test_plain_form_reads_back(tokenizer):
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    assert Vocabulary.from_dict(json.loads(json.dumps(vocabulary.to_dict()))) == vocabulary


def changed(tokenizer: Tokenizer, change) -> str:
    whole = json.loads(tokenizer.to_str())
    change(whole)
    return fingerprint(Tokenizer.from_str(json.dumps(whole)))


def test_the_fingerprint_ignores_what_does_not_decide_on_ids(tokenizer):
    before = fingerprint(tokenizer)
    assert before == Vocabulary.from_tokenizer(tokenizer).sha256

    def spell_merges_as_text(whole: dict) -> None:
        whole["model"]["merges"] = [" ".join(pair) for pair in whole["model"]["merges"]]
        assert whole["model"]["merges"]

    assert changed(tokenizer, spell_merges_as_text) == before
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9)
    assert fingerprint(tokenizer) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda whole: whole["model"]["merges"].pop(),
        lambda whole: whole["model"]["merges"].reverse(),
        lambda whole: whole.update(normalizer={"type": "Lowercase"}),
        lambda whole: whole.update(post_processor=None),
        lambda whole: whole["added_tokens"].pop(),
    ],
    ids=["a merge less", "merges reversed", "normalizer", "template", "added tokens"],
)
def test_the_fingerprint_sees_what_decides_on_ids(tokenizer, change):
    assert changed(tokenizer, change) != fingerprint(tokenizer)


def test_a_tokenizer_is_found_by_file_and_by_folder(tokenizer_folder):
    file = tokenizer_folder / "tokenizer.json"
    assert find_tokenizer(file) == find_tokenizer(str(tokenizer_folder)) == file


def test_truncation_and_padding_are_off(tokenizer, tmp_path):
    text = "the patient takes metformin today " * 3
    whole = tokenizer.encode(text).ids
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=500)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids) == 500
    assert load_tokenizer(tmp_path).encode(text).ids == whole


def test_what_is_no_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DetourError, match=r"no tokenizer\.json in this folder"):
        find_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DetourError, match=r"tokenizer\.json: not a tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(DetourError, match=r"no such tokenizer folder, and tokenizer\.json is not in the hub"):
        find_tokenizer("nobody/no-such-tokenizer")
    with pytest.raises(DetourError, match="no such tokenizer file or folder"):
        find_tokenizer(Path("a/b/c"))


@pytest.mark.parametrize(
    ("words", "says"),
    [({"<unk>": 0, "a": 100_000_000}, "the id 100,000,000 but only 2 tokens"), ({}, "no tokens")],
    ids=["a gap", "empty"],
)
def test_a_vocabulary_without_bounds_is_refused_before_tables_are_made(tmp_path, words, says):
    word_level(words).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DetourError, match=says) as caught:
        load_vocabulary(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "tokenizer.json"))


ODD = [None, True, -1, 1.5, "x", [], [None], {}, {"x": None}, 10**30]


def test_a_tokenizer_json_with_any_value_replaced_is_read_or_one_sentence(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    whole["model"]["merges"], whole["model"]["vocab"] = [], dict(list(whole["model"]["vocab"].items())[:8])
    paths = [(key,) for key in whole] + [("model", key) for key in whole["model"]] + [("added_tokens", 0)]
    paths += [("added_tokens", 0, key) for key in whole["added_tokens"][0]] + [("post_processor", "single")]
    refused = 0
    for path in paths:
        for value in ODD:
            tree = json.loads(json.dumps(whole))
            inner = tree
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
            (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
            try:
                load_vocabulary(tmp_path)
            except DetourError as error:
                refused += 1
                assert len(str(error).splitlines()) == 1
    assert refused > 100


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"mask_token": ["[MASK]"]}', "mask_token must be a string or an object"),
        ('{"mask_token": {"content": 3}}', "mask_token must be a string or an object"),
        ('{"cls_token": true}', "cls_token must be a string or an object"),
        ('{"pad_token": "a", "pad_token": "b"}', "duplicate key 'pad_token'"),
        ("[]", "not a JSON object"),
        ("{", "invalid JSON"),
    ],
)
def test_a_tokenizer_config_is_read_strictly(tokenizer, tmp_path, content, says):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(DetourError, match=says) as caught:
        load_vocabulary(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "tokenizer_config.json"))
