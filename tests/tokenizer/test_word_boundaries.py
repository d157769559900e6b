"""Where words begin: in byte-level, WordPiece and SentencePiece vocabularies, and which kinds are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from megatron_detour.errors import DetourError
from megatron_detour.tokenizer.vocabulary import Vocabulary, find_tokenizer
from megatron_detour.tokenizer.word_boundaries import Words
from tests.harness import ROOT

SHARED = ROOT / "../shared/data/tokenizers"
TEXT = "L'hôpital reçoit l’enfant, co-morbidité 38.5 °C: don't re-test β-lactam_x œdème 日本 😀ok"
WORDS = "L|'|hôpital|reçoit|l|’|enfant|,|co|-|morbidité|38|.|5|°|C|:|don|'t|re|-|test|β|-|lactam|_|x|œdème|日本|😀ok"


def words_of(tokenizer: Tokenizer, folder: Path) -> tuple[Words, Vocabulary]:
    tokenizer.save(str(folder / "tokenizer.json"))
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    return Words.from_file(folder / "tokenizer.json", vocabulary), vocabulary


def split(tokenizer: Tokenizer, words: Words, text: str) -> list[str]:
    """The text's words, by the characters that each word's tokens come from."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    first = words.first_tokens(np.array(encoding.ids), np.array([len(encoding.ids)])).tolist()
    ends = [*first[1:], len(encoding.ids)]
    spans = [(encoding.offsets[a][0], encoding.offsets[b - 1][1]) for a, b in zip(first, ends, strict=True)]
    return [text[begin:end] for begin, end in spans]


def joined(words: list[str]) -> str:
    """Without spaces, which may be tokens of their own."""
    return "|".join(word.strip() for word in words if word.strip())


def byte_level() -> Tokenizer:
    """Bytes and nothing else: every accent is spread over tokens."""
    alphabet = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_bytes_alone(tmp_path):
    """A character that is spread over tokens stays whole, and one at a word's end keeps the next letters."""
    tokenizer = byte_level()
    words, _ = words_of(tokenizer, tmp_path)
    ids = tokenizer.encode("L'été à Noël: 38.5 °C").ids
    first = words.first_tokens(np.array(ids), np.array([len(ids)])).tolist()
    pieces = [tokenizer.decode(ids[a:b]) for a, b in zip(first, [*first[1:], len(ids)], strict=True)]
    # The degree sign's bytes do not tell that it is no letter once it is complete: C stays with it.
    assert pieces == ["L", "'", "été", " ", "à", " ", "Noël", ":", " ", "38", ".", "5", " ", "°C"]


def test_the_project_s_own_tokenizer(tokenizer_folder):
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    words = Words.from_file(tokenizer_folder / "tokenizer.json", Vocabulary.from_tokenizer(tokenizer))
    text = "The patient takes metformin today. L'infirmière prescrit: 38.5 mg, depuis hier (œdema)"
    expected = "The|patient|takes|metformin|today|.|L|'|infirmière|prescrit|:|38|.|5|mg|,|depuis|hier|(|œdema|)"
    assert joined(split(tokenizer, words, text)) == expected
    assert len(tokenizer.encode(text).ids) > len(expected.split("|")) + 10  # many words are several tokens


def test_special_tokens_and_documents_are_borders(tokenizer_folder):
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    words = Words.from_file(tokenizer_folder / "tokenizer.json", vocabulary)
    letter = tokenizer.token_to_id("a")
    ids = np.array([vocabulary.cls, letter, letter, vocabulary.mask, letter, vocabulary.sep, vocabulary.pad, letter])
    assert words.first_tokens(ids, np.array([8])).tolist() == [0, 1, 3, 4, 5, 6, 7]
    assert words.first_tokens(np.full(6, letter), np.array([2, 1, 3])).tolist() == [0, 2, 3]
    special = list(vocabulary.special_ids)
    assert not words.continues[special].any()
    assert not words.is_open[special].any()


@pytest.mark.parametrize("name", ["modernbert_rebuilt", "gpt-neox-olmo-dolma-v1_5"])
def test_released_byte_level_tokenizers(name):
    file = SHARED / f"{name}.tokenizer.json"
    if not file.exists():
        pytest.skip(f"{file.name} is not on this machine")
    tokenizer = Tokenizer.from_file(str(file))
    words = Words.from_file(file, Vocabulary.from_tokenizer(tokenizer))
    # 't is one token; of the last bytes of 😀 nothing tells that they are no letter.
    assert joined(split(tokenizer, words, TEXT)) == WORDS


def word_piece(vocabulary: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[UNK]", "[CLS]"])
    return tokenizer


def test_word_piece(tmp_path):
    tokenizer = word_piece(["[UNK]", "[CLS]", "met", "##form", "##in", "l", "'", "h", "##ô", "##pital", "."])
    words, _ = words_of(tokenizer, tmp_path)
    assert split(tokenizer, words, "Metformin l'hôpital.") == ["Metformin", "l", "'", "hôpital", "."]


def test_released_word_piece(tmp_path):
    file = SHARED / "bert-base-uncased.vocab.txt"
    if not file.exists():
        pytest.skip(f"{file.name} is not on this machine")
    tokenizer = word_piece(file.read_text(encoding="utf-8").split("\n")[:-1])
    words, _ = words_of(tokenizer, tmp_path)
    assert split(tokenizer, words, "the dose of amlodipine (10.5)") == [
        "the",
        "dose",
        "of",
        "amlodipine",
        "(",
        "10",
        ".",
        "5",
        ")",
    ]


def sentence_piece(kind: str) -> Tokenizer:
    pieces = ["<unk>", "<0xC3>", "<0xB4>", "▁", "▁met", "form", "in", "▁l", "'", "h", "pital", ".", "3", "▁d", "e"]
    if kind == "Unigram":
        tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], 0, byte_fallback=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    else:
        ids = {piece: i for i, piece in enumerate(pieces)}
        tokenizer = Tokenizer(models.BPE(ids, [], unk_token="<unk>", byte_fallback=True))
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>"])
    return tokenizer


@pytest.mark.parametrize("kind", ["Unigram", "BPE"])
def test_sentence_piece(tmp_path, kind):
    tokenizer = sentence_piece(kind)
    words, _ = words_of(tokenizer, tmp_path)
    tokens = ["▁met", "form", "in", "▁l", "'", "h", "<0xC3>", "<0xB4>", "pital", ".", "3", "▁", "d", "e", "<unk>", "e"]
    ids = np.array([tokenizer.token_to_id(token.replace("d", "▁d") if token == "d" else token) for token in tokens])
    assert words.first_tokens(ids, np.array([len(ids)])).tolist() == [0, 3, 4, 5, 9, 10, 11, 12, 14, 15]


@pytest.mark.parametrize("model", [models.WordLevel({"a": 0}, "a"), models.BPE({"a": 0}, [])], ids=["words", "plain"])
def test_other_kinds_are_refused(tmp_path, model):
    with pytest.raises(DetourError, match=r"^whole_word_masking, entities: .*tokenizer\.json is not a byte-level BPE"):
        words_of(Tokenizer(model), tmp_path)


def test_ids_in_no_use(tokenizer_folder, tmp_path):
    """Their rows are there, and say that they belong to no word."""
    raw = json.loads(find_tokenizer(tokenizer_folder).read_text(encoding="utf-8"))
    last = max(raw["model"]["vocab"].values())
    raw["model"]["vocab"]["zz"] = last + 3
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    words, vocabulary = words_of(tokenizer, tmp_path)
    assert len(words.continues) == len(words.is_open) == vocabulary.size == last + 4
    assert not words.continues[[last + 1, last + 2]].any()
    assert words.continues[last + 3]
