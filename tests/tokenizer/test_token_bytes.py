"""How many bytes of text each id stands for."""

from __future__ import annotations

import json
import random

import pytest

from megatron_detour.tokenizer.token_bytes import byte_lengths
from megatron_detour.tokenizer.vocabulary import Vocabulary, find_tokenizer, load_tokenizer
from tests.conftest import sentences


def test_byte_level_pieces_add_up_to_the_text(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    lengths = byte_lengths(find_tokenizer(tokenizer_folder), vocabulary)
    assert lengths.shape == (vocabulary.size,)
    texts = [sentences(random.Random(i), 5) for i in range(20)] + ["œdème à 38,5 °C\n\tßΩ 漢字 🙂", "  x  "]
    for text in texts:
        assert lengths[tokenizer.encode(text).ids].sum() == len(text.encode())
    assert not lengths[list(vocabulary.special_ids)].any()


@pytest.mark.parametrize(
    ("model", "others", "expected"),
    [
        (
            {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
             "max_input_chars_per_word": 9, "vocab": {"[UNK]": 0, "the": 1, "##é": 2}},
            {},
            [0, 4, 2],
        ),
        (
            {"type": "Unigram", "unk_id": 0, "byte_fallback": True,
             "vocab": [["<unk>", 0.0], ["▁the", -1.0], ["<0xC3>", -2.0], ["é", -3.0]]},
            {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}},
            [0, 4, 1, 2],
        ),
    ],
    ids=["WordPiece", "Unigram"],
)  # fmt: skip
def test_other_kinds(tmp_path, model, others, expected):
    unknown = {"id": 0, "content": "[UNK]" if model["type"] == "WordPiece" else "<unk>", "single_word": False}
    unknown |= {"lstrip": False, "rstrip": False, "normalized": False, "special": True}
    raw = {"version": "1.0", "added_tokens": [unknown], "model": model} | others
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(raw))
    assert byte_lengths(file, Vocabulary.from_tokenizer(load_tokenizer(file))).tolist() == expected
