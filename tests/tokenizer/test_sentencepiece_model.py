"""A SentencePiece model's options: the tokenizer gives its own ids, or is refused with the option's name."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import sentencepiece

from megatron_detour.corpus.engines import SentencePiece
from megatron_detour.errors import DetourError
from megatron_detour.tokenizer.vocabulary import load_tokenizer, load_vocabulary
from tests.conftest import sentences

ODD = ["  two  spaces\nand a line ", "漢字 ﬁ ½ ABC", "\t tab\t", " ", "", "a   b", "Ünknown 🧬🧬 x", "\u3000a\u00a0b"]
EXACT = {
    "as usual": {},
    "spaces kept": {"remove_extra_whitespaces": False},
    "only spaces": {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True},
    "over spaces": {"split_by_whitespace": False},
    "over kept spaces": {"split_by_whitespace": False, "remove_extra_whitespaces": False, "add_dummy_prefix": False},
    "symbols": {"user_defined_symbols": ["<num>", "@@", "[MASK]"]},
    "no prefix": {"add_dummy_prefix": False},
    "bytes": {"byte_fallback": True, "vocab_size": 500},
    "identity": {"normalization_rule_name": "identity"},
    "lower case": {"normalization_rule_name": "nmt_nfkc_cf"},
    "nfkc": {"normalization_rule_name": "nfkc"},
}
REFUSED = {"treat_whitespace_as_suffix=true": {"treat_whitespace_as_suffix": True}}


def trained(folder: Path, **options) -> Path:
    rng = random.Random(5)
    texts = [sentences(rng, 2).replace(". ", ".  " if number % 3 else ". ") for number in range(400)]
    given = {"vocab_size": 240, "pad_id": 3, "hard_vocab_limit": False, "minloglevel": 2} | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_prefix=str(folder / "m"), **given)
    return folder / "m.model"


@pytest.mark.parametrize("case", EXACT)
def test_the_ids_are_those_of_sentencepiece_itself(tmp_path, case):
    path = trained(tmp_path, **EXACT[case])
    original = sentencepiece.SentencePieceProcessor(model_file=str(path))
    rng = random.Random(6)
    texts = [sentences(rng, 3) for _ in range(50)] + ODD
    if case == "symbols":
        texts += ["a<num>b <num> c@@ @@d", "<num> first", "the <num> patients", "<<num>>@@@"]
        assert "<num>" not in [t.content for t in load_tokenizer(path).get_added_tokens_decoder().values()]
        assert load_vocabulary(path).mask == original.piece_to_id("[MASK]")
    tokenizer = load_tokenizer(path)
    for text in texts:
        assert tokenizer.encode(text, add_special_tokens=False).ids == original.encode(text), text
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ids, begins = SentencePiece(tmp_path / "tokenizer.json").encode(texts)  # and back
    before, after = [1], [2]
    for text, begin, end in zip(texts, begins[:-1].tolist(), begins[1:].tolist(), strict=True):
        assert ids[begin:end].tolist() == [*before, *original.encode(text), *after], text


@pytest.mark.parametrize("option", REFUSED)
def test_an_option_that_makes_other_ids_is_refused_by_its_name(tmp_path, option):
    path = trained(tmp_path, **REFUSED[option])
    with pytest.raises(DetourError) as caught:
        load_tokenizer(path)
    assert str(caught.value).startswith(f"{path}: an equivalent tokenizer.json would give other ids")
    assert option in str(caught.value)


def test_a_unigram_without_an_unknown_token_is_not_sentencepieces(tmp_path):
    path = trained(tmp_path)
    load_tokenizer(path).save(str(tmp_path / "tokenizer.json"))
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    raw["model"]["unk_id"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(Exception, match="the model has no unknown token"):
        SentencePiece(tmp_path / "tokenizer.json")
