"""Engines give Hugging Face's ids, on anything that can be text, or are not used."""

from __future__ import annotations

import gzip
import json
import pickle
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from megatron_detour.corpus import BuildOptions, engines, sources, worker
from megatron_detour.corpus.engines import Engine, Fastokens, HuggingFace, SentencePiece, choose_engine
from megatron_detour.data.indexed import IndexedCorpus
from megatron_detour.data.manifest import read_manifest
from megatron_detour.errors import DetourError
from megatron_detour.tokenizer.vocabulary import load_tokenizer, load_vocabulary
from megatron_detour.tokenizer.word_boundaries import Words
from tests.conftest import build, sentences, write_jsonl

SHARED = Path(__file__).parents[2] / "../shared/data"
REAL = SHARED / "tokenizers/modernbert_rebuilt.tokenizer.json"
PIECES = [
    *("[MASK]", "[CLS]", "[SEP]", "[PAD]", "[UNK]", "[unused3]", "[MASK", "|||IP_ADDRESS|||"),
    *(" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u2003", "\u3000", "\u200b", "\u200d", "\u2028", "\ufeff", "\x85"),
    *("é", "e\u0301", "ﬁ", "ſ", "\u0345", "œ", "’", "…", "—", "don't", "I'LL", "'ſ", "123", "1234567"),
    *(
        "😀",
        "👨\u200d👩\u200d👧",
        "\U0001fae8",
        "\U000323af",
        "\ua7dc",
        "\U0010ffff",
        "\ue000",
        "\x00",
        "\x1f",
        "\x7f",
        "\ufffd",
    ),
]


@pytest.fixture(scope="module")
def byte_level(tokenizer_folder) -> Path:
    """The real vocabulary where it is there, else the small one with ModernBERT's special tokens."""
    return REAL if REAL.exists() else tokenizer_folder / "tokenizer.json"


@pytest.fixture(scope="module")
def pair(byte_level) -> tuple[Engine, Engine]:
    return Fastokens(byte_level), HuggingFace(byte_level)


def rows(engine: Engine, texts: list[str]) -> list[list[int]]:
    ids, begins = engine.encode(texts)
    assert begins.dtype == np.int64
    return [ids[start:end].tolist() for start, end in pairwise(begins)]


def test_the_judge_is_tokenizers_itself(byte_level):
    judge = Tokenizer.from_file(str(byte_level))
    texts = ["one text", "", "a [MASK] l'œil"]
    assert rows(HuggingFace(byte_level), texts) == [judge.encode(text).ids for text in texts]


def test_every_code_point(pair):
    """Each alone, doubled, after a space, before a digit and a comma."""
    points = [point for point in range(0x110000) if not 0xD800 <= point <= 0xDFFF]
    points = points[:0x3400] + points[0x3400::7]  # large scripts are sampled
    texts = [
        "".join(f"a {chr(p)}{chr(p)} {chr(p)}x1{chr(p)}," for p in points[i : i + 40])
        for i in range(0, len(points), 40)
    ]
    assert engines.first_difference(*pair, texts) is None


def test_made_up_texts(pair):
    rng = random.Random(0)

    def piece() -> str:
        draw = rng.random()
        if draw < 0.6:
            return rng.choice(PIECES)
        return (
            chr(rng.randrange(32, 127))
            if draw < 0.9
            else chr(rng.choice((0x80, 0x300, 0x4E00, 0x1F300)) + rng.randrange(256))
        )

    texts = ["".join(piece() for _ in range(rng.randrange(1, 50))) for _ in range(8_000)]
    assert engines.first_difference(*pair, texts) is None


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text() | st.lists(st.sampled_from(PIECES)).map("".join), min_size=1, max_size=5))
def test_whatever_hypothesis_finds(pair, texts):
    assert rows(pair[0], texts) == rows(pair[1], texts)


@pytest.mark.skipif(not REAL.exists(), reason="../shared/data is not there; the same is tested on made-up text")
def test_real_text_in_english_and_french(pair, tokenizer_folder):
    """A part of every corpus, also with a tokenizer that normalizes."""
    small = tokenizer_folder / "tokenizer.json"
    for source in sorted((SHARED / "corpora").glob("*.heldout.jsonl.gz")):
        with gzip.open(source, "rt", encoding="utf-8") as lines:
            texts = [json.loads(line)["text"] for line in lines]
        assert engines.first_difference(*pair, texts) is None, source
        assert engines.first_difference(Fastokens(small), HuggingFace(small), texts[:40]) is None, source


@pytest.fixture(scope="module")
def unigram(tmp_path_factory) -> Path:
    """A small SentencePiece Unigram model with the tokens that training needs."""
    folder = tmp_path_factory.mktemp("unigram")
    rng = random.Random(5)
    texts = [sentences(rng, 2) for _ in range(400)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "m"),
        vocab_size=240,
        pad_id=3,
        user_defined_symbols=["[MASK]"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return folder / "m.model"


def test_a_sentencepiece_model_is_a_tokenizer(unigram, tmp_path):
    """Ids as the library's own, <s> and </s> around, and the same after a round by way of tokenizer.json."""
    library = sentencepiece.SentencePieceProcessor(model_file=str(unigram))
    rng = random.Random(6)
    texts = [sentences(rng, 2) for _ in range(100)] + ["  two  spaces\nand a line ", "漢字 ﬁ ½"]
    vocabulary = load_vocabulary(unigram)
    assert (vocabulary.cls, vocabulary.sep, vocabulary.pad) == (1, 2, 3)
    assert vocabulary.mask == library.piece_to_id("[MASK]")
    engine, judge = SentencePiece(unigram), HuggingFace(unigram)
    expected = [[1, *library.encode(text), 2] for text in texts]
    assert rows(engine, texts) == expected
    assert engines.first_difference(engine, judge, texts) is None
    load_tokenizer(unigram).save(str(tmp_path / "tokenizer.json"))
    assert rows(SentencePiece(tmp_path / "tokenizer.json"), texts) == expected
    assert load_vocabulary(tmp_path / "tokenizer.json") == vocabulary
    words = Words.from_file(unigram, vocabulary)
    ids = np.array(library.encode("takes metformin today"))
    begins = words.first_tokens(ids, np.array([len(ids)]))
    assert [library.id_to_piece(int(i))[0] for i in ids[begins]] == ["▁"] * 3
    masked = f"{texts[0]} [MASK] {texts[1]}"
    assert rows(engine, [masked]) == rows(judge, [masked])
    assert vocabulary.mask in rows(engine, [masked])[0]


def test_equally_likely_segmentations_of_the_same_text_are_as_good(unigram):
    engine = SentencePiece(unigram)
    number = {piece: i for i, (piece, _) in enumerate(engine._pieces)}
    score = dict(engine._pieces)
    whole = next(p for p in number if len(p) == 2 and p.isalpha() and p[0] != p[1] and set(p) <= set(number))
    ids, other = np.array([1, number[whole[0]], number[whole[1]], 2]), np.array([1, number[whole], 2])
    engine._pieces[number[whole]] = (whole, score[whole[0]] + score[whole[1]])
    assert engine.agrees(ids, other)
    assert not engine.agrees(ids, ids[[0, 2, 1, 3]])  # as likely, and another text
    engine._pieces[number[whole]] = (whole, score[whole[0]] + score[whole[1]] + 0.01)
    assert not engine.agrees(ids, other)


def test_the_engine_that_serves_is_chosen(byte_level, unigram, tmp_path):
    assert choose_engine("auto", byte_level, ["some text"]).name == "fastokens"
    chosen = choose_engine("auto", unigram, ["some text"])
    assert chosen.name == "sentencepiece"
    assert "Precompiled" in chosen.passed_over["fastokens"]
    assert choose_engine("tokenizers", byte_level, []).name == "tokenizers"
    with pytest.raises(DetourError, match=r"--engine sentencepiece: the model is BPE, not Unigram"):
        choose_engine("sentencepiece", byte_level, [])


class Wrong(Fastokens):
    """An engine with a fault in texts that hold a certain word."""

    def encode(self, texts):
        return super().encode([text.replace("metformin", "metformine") for text in texts])


def test_an_engine_that_differs_is_not_chosen(byte_level, monkeypatch):
    monkeypatch.setitem(engines.ENGINES, "fastokens", Wrong)
    assert choose_engine("auto", byte_level, ["other text"]).name == "fastokens"
    chosen = choose_engine("auto", byte_level, ["some metformin"])
    assert chosen.name == "tokenizers"
    assert "its ids differ from those of tokenizers" in chosen.passed_over["fastokens"]
    with pytest.raises(DetourError, match="--engine auto chooses one that supports"):
        choose_engine("fastokens", byte_level, ["some metformin"])


def test_a_corpus_of_each_engine_has_the_same_ids(tmp_path, tokenizer_folder, unigram):
    rng = random.Random(7)
    path = write_jsonl(tmp_path / "t.jsonl", [sentences(rng, rng.randint(1, 9)) for _ in range(60)] + ["a [MASK] b"])
    for tokenizer, fast in ((tokenizer_folder, "fastokens"), (unigram, "sentencepiece")):
        for engine in (fast, "tokenizers"):
            build([path], tmp_path / engine, tokenizer, engine=engine, overwrite=True)
            assert read_manifest(tmp_path / engine).engine["name"] == engine
        ours, theirs = IndexedCorpus(tmp_path / fast), IndexedCorpus(tmp_path / "tokenizers")
        assert [ours.tokens(i).tolist() for i in range(61)] == [theirs.tokens(i).tolist() for i in range(61)]


class PanicException(BaseException):
    """As the tokenizers library's: no Exception, and of a class that cannot be sent to another process."""


@pytest.mark.parametrize("fault", [Exception("retry-limit-in-match over"), PanicException("capacity\noverflow")])
def test_what_the_library_raises_is_a_sentence_with_the_lines(tmp_path, tokenizer_folder, monkeypatch, fault):
    class Fails(HuggingFace):
        def __init__(self, file):
            super().__init__(file)
            self._tokenizer = self

        def encode_batch_fast(self, texts):
            raise fault

    monkeypatch.setitem(engines.ENGINES, "tokenizers", Fails)
    path = write_jsonl(tmp_path / "t.jsonl", ["one", "two"])
    part = sources.plan_parts(sources.plan_shards([str(path)]), "")[0]
    options = BuildOptions(str(tmp_path / "c"), str(tokenizer_folder), (str(path),))
    job = worker.Job(options, "tokenizers", str(tokenizer_folder / "tokenizer.json"), "<u2", 2)
    (tmp_path / ".c.building").mkdir()
    with pytest.raises(DetourError, match=r"t\.jsonl, lines 1 to 2: a text cannot be tokenized: ") as caught:
        worker.build_part(part, job, lambda read, made: None)
    assert type(caught.value) is DetourError
    assert "\n" not in str(caught.value)
    assert type(pickle.loads(pickle.dumps(caught.value))) is DetourError


def small(folder: Path, model, specials: int) -> Path:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if specials:
        tokenizer.add_special_tokens(["[CLS]", "[SEP]"])
        ids = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("specials", [0, 2])
@pytest.mark.parametrize(
    "model",
    [models.BPE({"б": 0, "в": 1}, []), models.Unigram([("б", -1.0), ("в", -2.0)]), models.WordLevel({"б": 0, "в": 1})],
    ids=["drops what it does not know", "has no unknown token", "is of words"],
)
def test_a_tokenizer_that_does_not_know_our_probes_builds_what_it_knows(tmp_path, model, specials):
    """Its vocabulary has no "a", and no character of the trial texts."""
    tokenizer = small(tmp_path, model, specials)
    path = write_jsonl(tmp_path / "known.jsonl", ["б", "б в"])
    manifest = build([path], tmp_path / "c", tokenizer)
    assert (manifest.documents, manifest.tokens) == (2, 3 + 2 * specials)


def test_a_text_without_ids_is_refused_with_its_place(tmp_path):
    tokenizer = small(tmp_path, models.Unigram([("б", -1.0), ("в", -2.0)]), 2)
    path = write_jsonl(tmp_path / "t.jsonl", ["б", "漢"])
    with pytest.raises(DetourError, match=r"t\.jsonl, lines 1 to 2: a text cannot be tokenized: .*unk_id"):
        build([path], tmp_path / "c", tokenizer)


def test_a_tokenizer_of_special_tokens_alone_is_refused(tmp_path):
    tokenizer = small(tmp_path, models.BPE(), 2)
    path = write_jsonl(tmp_path / "t.jsonl", ["б"])
    with pytest.raises(DetourError, match="turns no text into tokens"):
        build([path], tmp_path / "c", tokenizer)
