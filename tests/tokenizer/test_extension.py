"""Which tokenizers extend another one, and the old pieces of what they add."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from megatron_detour.errors import DetourError
from megatron_detour.tokenizer.extension import new_pieces
from megatron_detour.tokenizer.vocabulary import load_tokenizer
from tests.tokenizer.test_kinds import NAMES, unigram


def changed(tokenizer: Tokenizer, change: Callable[[dict[str, Any]], Any]) -> Tokenizer:
    raw = json.loads(tokenizer.to_str())
    change(raw)
    return Tokenizer.from_str(json.dumps(raw))


def add(raw: dict[str, Any], piece: str, number: int = 400, merge: int | None = None) -> None:
    """Adds the special tokens, as their ids follow from the vocabulary, and a piece with a merge of its last letter."""
    raw["model"]["vocab"][piece] = number
    merges = raw["model"]["merges"]
    merges.insert(len(merges) if merge is None else merge, [piece[:-1], piece[-1]])


def test_pieces_of_byte_level_bpe(tokenizer_folder):
    old = load_tokenizer(tokenizer_folder)
    assert new_pieces(old, old) == {}
    new = changed(old, lambda raw: (add(raw, "Ġpatientx"), add(raw, "Ġpatientxx", 401)))
    x = old.token_to_id("x")
    assert new_pieces(old, new) == {400: [old.token_to_id("Ġpatient"), x], 401: [old.token_to_id("Ġpatient"), x, x]}


def test_added_tokens_are_read_as_text(tokenizer_folder):
    """As transformers' add_tokens adds them."""
    old, new = load_tokenizer(tokenizer_folder), load_tokenizer(tokenizer_folder)
    new.add_tokens(["xpatient"])
    new.add_special_tokens(["[X]"])
    assert new_pieces(old, new) == {
        400: old.encode("xpatient", add_special_tokens=False).ids,
        401: [old.token_to_id(character) for character in "[X]"],
    }


def test_pieces_of_word_piece():
    """At the start of a word and inside, and an unknown one."""
    vocabulary = {"[UNK]": 0, "met": 1, "##met": 2, "##form": 3, "m": 4, "##e": 5}
    old = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    more = {"metform": 6, "##metform": 7, "mee": 8, "##ée": 9}
    new = Tokenizer(models.WordPiece(vocabulary | more, unk_token="[UNK]"))
    assert new_pieces(old, new) == {6: [1, 3], 7: [2, 3], 8: [4, 5, 5], 9: [0]}


REFUSED = {
    "a step": (lambda raw: raw.update(normalizer=None), "its normalizer differs"),
    "a setting": (lambda raw: raw["model"].update(dropout=0.1), "its model has other settings"),
    "a merge in between": (lambda raw: add(raw, "Ġpatientx", merge=3), "its merges do not begin with the old ones"),
    "a merge less": (lambda raw: raw["model"]["merges"].pop(), "its merges do not begin with the old ones"),
    "a gap": (lambda raw: add(raw, "Ġpatientx", 405), "its new ids do not follow the old ones"),
    "an old token that is special now": (
        lambda raw: raw["added_tokens"][1].update(special=False),
        "its added tokens differ",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_extend_it(tokenizer_folder, case):
    change, says = REFUSED[case]
    old = load_tokenizer(tokenizer_folder)
    with pytest.raises(DetourError, match=f"^{says}$"):
        new_pieces(old, changed(old, change))


def test_other_ids_and_missing_pieces():
    old, swapped, less = (
        Tokenizer(models.WordPiece(ids, unk_token="a")) for ids in ({"a": 0, "b": 1}, {"a": 1, "b": 0}, {"a": 0})
    )
    for new, piece in ((swapped, "a"), (less, "b")):
        with pytest.raises(DetourError, match=f"^its '{piece}' has another id or is missing$"):
            new_pieces(old, new)


def test_other_scores_of_unigram():
    old = unigram(NAMES)
    new = changed(old, lambda raw: raw["model"]["vocab"][9].__setitem__(1, -1.5))
    with pytest.raises(DetourError, match=r"^its scores do not begin with the old ones$"):
        new_pieces(old, new)


def test_a_piece_of_nothing_known():
    old, new = (Tokenizer(models.BPE({"a": 0}, [])) for _ in range(2))
    for tokenizer in (old, new):
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    new.add_tokens([AddedToken("漢")])
    with pytest.raises(DetourError, match=r"^no old piece stands for its '漢'$"):
        new_pieces(old, new)
