"""Tokenizers of every kind, and of other names than ModernBERT's: transformers' ids, special tokens by role, words."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_detour.checkpoint.huggingface import Source, copy_tokenizer
from megatron_detour.data.indexed import IndexedCorpus
from megatron_detour.errors import DetourError
from megatron_detour.tokenizer.vocabulary import SPELLINGS, find_tokenizer, load_tokenizer, load_vocabulary
from megatron_detour.tokenizer.word_boundaries import Words
from tests.conftest import build, sentences, write_jsonl
from tests.harness import ROOT

SHARED = ROOT / "../shared/data/tokenizers"
NAMES = {"unk": "<odd>", "cls": "<begin>", "sep": "<end>", "pad": "<blank>", "mask": "<gap>"}
BERT = {"unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]"}
TEXT = "La patiente prescrit: metformin, 38 mg (depuis hier) œdème"
WORDS = "La|patiente|prescrit|:|metformin|,|38|mg|(|depuis|hier|)|œdème"


def texts(count: int = 300) -> list[str]:
    rng = random.Random(8)
    return [f"{sentences(rng, 2)} ({number}): l'{rng.choice(('œdème', 'ÉTAT'))}" for number in range(count)]


def train(tokenizer: Tokenizer, trainer: type, names: dict[str, str], **options) -> Tokenizer:
    special = [AddedToken(name, special=True, normalized=False) for name in names.values()]
    made = trainer(vocab_size=400, special_tokens=special, show_progress=False, **options)
    tokenizer.train_from_iterator(texts(), made)
    ids = [(names[role], tokenizer.token_to_id(names[role])) for role in ("cls", "sep")]
    single = f"{names['cls']} $A {names['sep']}"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return tokenizer


def word_piece(names: dict[str, str]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token=names["unk"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return train(tokenizer, trainers.WordPieceTrainer, names)


def byte_level(names: dict[str, str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return train(tokenizer, trainers.BpeTrainer, names, initial_alphabet=alphabet)


def unigram(names: dict[str, str]) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return train(tokenizer, trainers.UnigramTrainer, names, unk_token=names["unk"])


def sentencepiece_bpe(names: dict[str, str]) -> Tokenizer:
    """As Llama's: spaces become part of pieces by the normalizer, and nothing splits a text."""
    tokenizer = Tokenizer(models.BPE(unk_token=names["unk"], fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    train(tokenizer, trainers.BpeTrainer, names)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return tokenizer


TRAINED = {"WordPiece": word_piece, "byte-level": byte_level, "Unigram": unigram, "BPE": sentencepiece_bpe}


def save(tokenizer: Tokenizer, folder: Path, names: dict[str, str], file: str = "tokenizer_config.json") -> Path:
    """Write a folder whose `file` names the special tokens."""
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    content = {"tokenizer_class": "PreTrainedTokenizerFast"} | {f"{role}_token": name for role, name in names.items()}
    (folder / file).write_text(json.dumps(content))
    return folder


def check(folder: Path | str, theirs, tmp_path: Path, documents: list[str]) -> None:
    """A corpus has transformers' ids, and every role the id that transformers gives it."""
    build([write_jsonl(tmp_path / "t.jsonl", documents)], tmp_path / "corpus", folder)
    corpus = IndexedCorpus(tmp_path / "corpus")
    for number, text in enumerate(documents):
        assert corpus.tokens(number).tolist() == theirs(text, verbose=False).input_ids, text
    vocabulary = load_vocabulary(folder)
    assert {role: getattr(vocabulary, role) for role in SPELLINGS} == {
        role: getattr(theirs, f"{role}_token_id") for role in SPELLINGS
    }


def words(folder: Path | str, text: str) -> str:
    tokenizer = load_tokenizer(folder)
    encoding = tokenizer.encode(text, add_special_tokens=False)
    begins = Words.from_file(find_tokenizer(folder), load_vocabulary(folder)).first_tokens(
        np.array(encoding.ids), np.array([len(encoding.ids)])
    )
    ends = [*begins[1:].tolist(), len(encoding.ids)]
    parts = [
        text[encoding.offsets[a][0] : encoding.offsets[b - 1][1]] for a, b in zip(begins.tolist(), ends, strict=True)
    ]
    return "|".join(part.strip() for part in parts if part.strip())


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("kind", TRAINED)
def test_special_tokens_of_any_name_are_found_by_their_role(tmp_path, kind, file):
    folder = save(TRAINED[kind](NAMES), tmp_path / "model", NAMES, file)
    theirs = AutoTokenizer.from_pretrained(folder)
    check(folder, theirs, tmp_path, [*texts(40), "  two  spaces\n", "漢字 ﬁ ½ 🧬"])
    assert words(folder, TEXT) == WORDS


def test_the_post_processor_and_the_model_say_what_nothing_names(tmp_path):
    """The spelling counts last: here <s> is a token of another use."""
    tokenizer = unigram(NAMES)
    tokenizer.add_special_tokens(["<s>", "[SEP]", "<unk>", "<pad>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = load_vocabulary(tmp_path)
    spelled = [tokenizer.id_to_token(getattr(vocabulary, role)) for role in ("cls", "sep", "unk", "pad")]
    assert spelled == ["<begin>", "<end>", "<odd>", "<pad>"]
    assert vocabulary.mask is None
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 2)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_vocabulary(tmp_path).cls is None


def test_a_vocab_txt_must_be_berts_and_say_whether_case_matters(tmp_path):
    path, config = tmp_path / "vocab.txt", tmp_path / "tokenizer_config.json"
    path.write_text("".join(f"{name}\n" for name in [*BERT.values(), "a", "B", "##a"]))
    with pytest.raises(DetourError, match=r'has capital letters, .* write one with \{"do_lower_case": false\}'):
        load_tokenizer(path)
    config.write_text('{"do_lower_case": false}')
    assert load_tokenizer(path).encode("B Ba").tokens == ["[CLS]", "B", "B", "##a", "[SEP]"]
    config.write_text('{"tokenizer_class": "BertJapaneseTokenizer"}')
    with pytest.raises(DetourError, match=r"the vocabulary of a BertJapaneseTokenizer; open it with transformers"):
        load_tokenizer(path)
    config.unlink()
    path.write_text("a\nb\n")
    with pytest.raises(DetourError, match=r"vocab\.txt: not BERT's vocab\.txt: sep_token not found"):
        load_tokenizer(path)


@pytest.mark.parametrize("lower", [True, False])
def test_a_vocab_txt_of_bert(tmp_path, lower):
    """A folder without tokenizer.json, the bare file, and what a checkpoint makes of it."""
    tokenizer = word_piece(BERT)
    pieces = sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)
    folder = tmp_path / "bert"
    folder.mkdir()
    lines = [*BERT.values(), *(piece.lower() if lower else piece for piece in pieces[len(BERT) :])]
    (folder / "vocab.txt").write_text("".join(f"{line}\n" for line in dict.fromkeys(lines)))
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": lower, "strip_accents": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = AutoTokenizer.from_pretrained(folder)
    documents = [*texts(40), "l’été 日本 ÉTÉ [MASK] co-morbid", "🧬"]
    check(folder, theirs, tmp_path, documents)
    assert words(folder, TEXT) == WORDS
    copy = tmp_path / "copy"
    copy.mkdir()
    copy_tokenizer(Source(str(folder)), load_vocabulary(folder), copy, ("input_ids", "attention_mask"))
    check(copy, AutoTokenizer.from_pretrained(copy), tmp_path / "copy", documents)
    assert load_vocabulary(copy) == load_vocabulary(folder)


@pytest.mark.parametrize("special", [{}, {"bos_piece": "<begin>", "eos_piece": "<end>", "pad_piece": "<blank>"}])
def test_a_sentencepiece_bpe_model(tmp_path, special):
    """Against the library itself, and against transformers' class for such models."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts()),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        pad_id=3,
        control_symbols=["[MASK]"],
        minloglevel=2,
        **special,
    )
    path, documents = tmp_path / "tokenizer.model", [*texts(40), "漢字 ﬁ ½ 🧬", "Ünknown (x)"]
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    encoded = load_tokenizer(path).encode_batch(documents)
    assert [e.ids for e in encoded] == [[1, *library.encode(text), 2] for text in documents]
    vocabulary = load_vocabulary(path)
    assert (vocabulary.unk, vocabulary.cls, vocabulary.sep, vocabulary.pad) == (0, 1, 2, 3)
    assert vocabulary.mask == library.piece_to_id("[MASK]")
    assert words(path, TEXT) == WORDS
    copy = tmp_path / "copy"
    copy.mkdir()
    copy_tokenizer(Source(str(path)), vocabulary, copy, ("input_ids", "attention_mask"))
    check(copy, AutoTokenizer.from_pretrained(copy), copy, documents)
    names = {"bos_token": library.id_to_piece(1), "eos_token": library.id_to_piece(2)}
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": True} | names
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    llama = AutoTokenizer.from_pretrained(tmp_path)
    assert [e.ids for e in encoded] == [llama(text).input_ids for text in documents]


def test_released_tokenizers_have_transformers_ids(tmp_path):
    if not SHARED.is_dir():
        pytest.skip("the released tokenizers are not on this machine")
    bert = tmp_path / "bert"
    bert.mkdir()
    shutil.copyfile(SHARED / "bert-base-uncased.vocab.txt", bert / "vocab.txt")
    (bert / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    (tmp_path / "b").mkdir()
    documents = [*texts(40), "Été l’œdème 日本 [MASK] Metformin", "🧬"]
    check(bert, AutoTokenizer.from_pretrained(bert), tmp_path / "b", documents)
    library = sentencepiece.SentencePieceProcessor(model_file=str(SHARED / "sentencepiece_test_model_en.model"))
    encoded = load_tokenizer(SHARED / "sentencepiece_test_model_en.model").encode_batch(documents)
    assert [e.ids for e in encoded] == [[1, *library.encode(text), 2] for text in documents]
    for name in ("modernbert_rebuilt", "gpt-neox-olmo-dolma-v1_5"):
        file = SHARED / f"{name}.tokenizer.json"
        theirs = PreTrainedTokenizerFast(tokenizer_file=str(file))
        assert [e.ids for e in load_tokenizer(file).encode_batch(documents)] == theirs(documents).input_ids
