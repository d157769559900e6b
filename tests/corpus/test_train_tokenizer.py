"""The tokenizer trainer: exact size, ModernBERT's template, lossless text, reproducible and whole output."""

from __future__ import annotations

import gzip
import json
import random
import socket
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megatron_detour.corpus.documents import read_documents
from megatron_detour.corpus.train_tokenizer import SMALLEST_VOCABULARY, train_tokenizer
from megatron_detour.errors import DetourError

ODD = "  Œdème à 38,5 °C\t\t— naïve 漢字 🧬\n\n  I'll l'été ‘x’ \u00a0 \x07 [x] ﬁ ½ "


def _documents(count: int = 300) -> list[str]:
    rng = random.Random(5)
    words = ["".join(rng.choices("abcdeéilnorst", k=rng.randint(2, 9))) for _ in range(400)]
    return [" ".join(rng.choices(words, k=30)) for _ in range(count)]


def _jsonl(path: Path, documents: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}, ensure_ascii=False) + "\n" for text in documents), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return _jsonl(tmp_path_factory.mktemp("corpus") / "texts.jsonl", _documents())


@pytest.fixture(scope="module")
def folder(corpus) -> Path:
    output = corpus.parent / "tokenizer"
    train_tokenizer([corpus], output, 512)
    return output


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def test_size_is_exact_and_ids_are_dense(tokenizer):
    assert len(tokenizer) == 512
    assert sorted(tokenizer.get_vocab().values()) == list(range(512))


def test_special_tokens(tokenizer):
    names = ("unk", "cls", "sep", "pad", "mask")
    assert [getattr(tokenizer, f"{name}_token") for name in names] == [f"[{name.upper()}]" for name in names]
    assert [getattr(tokenizer, f"{name}_token_id") for name in names] == [0, 1, 2, 3, 4]
    assert tokenizer.model_max_length == 8192
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]


def test_template_and_type_ids(tokenizer):
    plain = tokenizer("alors", add_special_tokens=False).input_ids
    assert tokenizer("alors").input_ids == [1, *plain, 2]
    pair = tokenizer("alors", "alors", return_token_type_ids=True)
    assert pair.input_ids == [1, *plain, 2, *plain, 2]
    assert set(pair.token_type_ids) == {0}


def test_mask_takes_the_space_before_it_and_not_the_one_after(tokenizer):
    ids = tokenizer("on [MASK] est", add_special_tokens=False).input_ids
    expected = [
        *tokenizer("on", add_special_tokens=False).input_ids,
        tokenizer.mask_token_id,
        *tokenizer(" est", add_special_tokens=False).input_ids,
    ]
    assert ids == expected


def test_odd_text_comes_back(tokenizer):
    ids = tokenizer(ODD, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", ODD)
    assert tokenizer.unk_token_id not in ids


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60).filter(lambda text: "[" not in text))
@settings(max_examples=60, deadline=None)
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == unicodedata.normalize("NFC", text)


def test_composed_and_decomposed_letters_are_the_same(tokenizer):
    assert tokenizer("été").input_ids == tokenizer(unicodedata.normalize("NFD", "été")).input_ids


def test_same_input_gives_the_same_bytes(corpus, folder, tmp_path):
    train_tokenizer([corpus], tmp_path / "again", 512)
    names = ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == names
    assert all((folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_all_kinds_of_file_hold_the_same_documents(tmp_path):
    documents = ["le premier", "le second"]
    plain = _jsonl(tmp_path / "a.jsonl", documents)
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    lines = tmp_path / "a.txt"
    lines.write_text("le premier\n\nle second\n")
    assert [list(read_documents(path)) for path in (plain, packed, lines)] == [documents] * 3


def test_every_input_is_used(tmp_path):
    first, second = (tmp_path / name for name in ("a.txt", "b.txt"))
    first.write_text("aaaa bbbb\n" * 9)
    second.write_text("zyzyzyzy\n" * 99)
    train_tokenizer([first, second], tmp_path / "out", SMALLEST_VOCABULARY + 3)
    assert "zy" in AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()


def test_corpus_too_small_says_how_far_it_reached(tmp_path):
    path = _jsonl(tmp_path / "a.jsonl", ["ab"])
    with pytest.raises(DetourError, match=r"only 262 of 300 .*--vocab-size to 262"):
        train_tokenizer([path], tmp_path / "out", 300)
    train_tokenizer([path], tmp_path / "out", 262)


def test_vocabulary_smaller_than_the_bytes_is_refused(corpus, tmp_path):
    with pytest.raises(DetourError, match="261"):
        train_tokenizer([corpus], tmp_path / "out", 260)


def test_used_output_is_refused_and_kept(corpus, tmp_path):
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(DetourError, match="is not an empty folder"):
        train_tokenizer([corpus], tmp_path, 512)
    with pytest.raises(DetourError, match="is not an empty folder"):
        train_tokenizer([corpus], tmp_path / "keep.txt", 512)
    assert (tmp_path / "keep.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\nnot json\n', r"a\.jsonl, line 2: invalid JSON"),
        (b'{"text": "a"}\n\n[1]\n', r"a\.jsonl, line 3: not a JSON object"),
        (b'{"texte": "a"}\n', r"a\.jsonl, line 1: no key 'text' \(there is 'texte'\); set --text-key"),
        (b'{"text": 3}\n', r"a\.jsonl, line 1: the value of 'text' is not a string"),
        (b'{"text": "a"}\n{"text": "\xe9"}\n', r"a\.jsonl, line 2: not UTF-8"),
    ],
)
def test_bad_line_is_named_and_nothing_is_left(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DetourError, match=message):
        train_tokenizer([tmp_path / "a.jsonl"], tmp_path / "out", 512)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_bad_file_is_named(tmp_path):
    whole = gzip.compress(b'{"text": "a"}\n' * 1000)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) - 12])
    (tmp_path / "plain.jsonl.gz").write_bytes(b'{"text": "a"}\n')
    (tmp_path / "a.csv").write_text("a")
    for name, message in (
        ("absent.jsonl", "no such input file"),
        ("cut.jsonl.gz", "cannot be read to its end"),
        ("plain.jsonl.gz", "cannot be read to its end"),
        ("a.csv", "must end in"),
    ):
        with pytest.raises(DetourError, match=message):
            train_tokenizer([tmp_path / name], tmp_path / "out", 512)


def test_what_a_killed_training_has_left_aside_goes(tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"a text about the patient, number {number}\n" for number in range(200)))
    left = tmp_path / f".tokenizer.writing-{socket.gethostname()}-{2**22 + 1}"  # no process has so high a number
    left.mkdir()
    train_tokenizer([texts], tmp_path / "tokenizer", SMALLEST_VOCABULARY)
    assert {path.name for path in tmp_path.iterdir()} == {"texts.txt", "tokenizer"}
