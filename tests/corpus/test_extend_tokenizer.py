"""Extended tokenizers: which pieces are added, what stays as it was, what is written and what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from megatron_detour.commands.main import main
from megatron_detour.corpus.engines import choose_engine
from megatron_detour.corpus.extend_tokenizer import HELD_OUT, extend_tokenizer
from megatron_detour.errors import DetourError
from megatron_detour.tokenizer.extension import new_pieces
from megatron_detour.tokenizer.vocabulary import SPELLINGS, find_tokenizer, load_tokenizer, load_vocabulary
from tests.conftest import sentences, write_jsonl
from tests.harness import ROOT
from tests.tokenizer.test_kinds import NAMES, TRAINED, save, texts
from tests.tokenizer.test_sentencepiece_model import trained

SHARED = ROOT / "../shared/data"
ADDED = 40
STEMS = ("cardio", "nephro", "hépato", "gastro", "dermato", "neuro")
ENDS = ("pathie", "logie", "graphy", "megaly", "sclerosis", "tomie")
ODD = ["  two  spaces\n\tand a line ", "漢字 ﬁ ½ 🧬🧬", "<gap> <begin> x <gap>y", "cardiopathiecardiopathies Ça"]


def domain(count: int, seed: int = 3) -> list[str]:
    rng = random.Random(seed)
    return [f"{sentences(rng, 1)} {rng.choice(STEMS)}{rng.choice(ENDS)}, {rng.choice(STEMS)}" for _ in range(count)]


@pytest.fixture(scope="module", params=[*TRAINED, "SentencePiece's file"])
def extended(request, tmp_path_factory) -> tuple[Path, Path, dict]:
    """A small tokenizer, the folder of its extension, and the report."""
    folder = tmp_path_factory.mktemp("extended")
    if request.param in TRAINED:
        start = save(TRAINED[request.param](NAMES), folder / "start", NAMES)
    else:
        start = trained(folder, user_defined_symbols=["[MASK]"])
    corpus = write_jsonl(folder / "domain.jsonl", domain(600))
    return start, folder / "out", extend_tokenizer(str(start), [corpus], folder / "out", ADDED)


def test_old_pieces_and_special_tokens_keep_their_ids(extended):
    start, out, _ = extended
    old, new = load_tokenizer(start), load_tokenizer(out)
    before, after = load_vocabulary(start), load_vocabulary(out)
    assert [getattr(before, role) for role in SPELLINGS] == [getattr(after, role) for role in SPELLINGS]
    assert (after.size, after.special_ids) == (before.size + ADDED, before.special_ids)
    assert old.get_vocab().items() <= new.get_vocab().items()
    added, still = (
        {number: token.content for number, token in tokenizer.get_added_tokens_decoder().items()}
        for tokenizer in (old, new)
    )
    assert added == still
    assert list(new_pieces(old, new)) == [*range(before.size, after.size)]
    assert len(old.encode("<begin> x").ids) == len(new.encode("<begin> x").ids)


def test_what_the_old_tokens_become(extended):
    """BPE: a new piece replaces just its old pieces. Others: what has no new piece keeps its ids."""
    start, out, _ = extended
    old, new = load_tokenizer(start), load_tokenizer(out)
    pieces = new_pieces(old, new)
    is_bpe, used = isinstance(old.model, models.BPE), 0
    for text in [*domain(200, seed=4), *texts(50), *ODD]:
        for part in [text] if is_bpe else text.split():
            ids, expected = (t.encode(part, add_special_tokens=False).ids for t in (new, old))
            used += any(number in pieces for number in ids)
            if is_bpe or not any(number in pieces for number in ids):
                assert [id_ for number in ids for id_ in pieces.get(number, [number])] == expected, part
    assert used > 100


def test_the_pieces_save_tokens_on_text_that_was_not_counted(extended):
    start, out, report = extended
    assert json.loads((out / "fertility.json").read_text()) == report
    kept = domain(600)[::HELD_OUT]
    words, size = sum(len(text.split()) for text in kept), sum(len(text.encode()) for text in kept)
    assert report["held_out"] == {"documents": len(kept), "words": words, "bytes": size}
    for when, folder in (("before", start), ("after", out)):
        tokenizer = load_tokenizer(folder)
        tokens = sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in kept)
        ratios = {"tokens_per_word": round(tokens / words, 4), "bytes_per_token": round(size / tokens, 4)}
        assert report[when] == {"tokens": tokens} | ratios
    assert report["after"]["tokens"] < 0.85 * report["before"]["tokens"]


def test_transformers_and_the_engines_read_it_alike(extended):
    start, out, _ = extended
    tokenizer, theirs = load_tokenizer(out), AutoTokenizer.from_pretrained(out)
    documents = [*domain(50, seed=5), *ODD]
    assert theirs(documents).input_ids == [encoding.ids for encoding in tokenizer.encode_batch(documents)]
    assert theirs.mask_token_id == load_vocabulary(out).mask
    engines = [choose_engine("auto", find_tokenizer(name), documents).name for name in (start, out)]
    assert engines[0] == engines[1]


def letters(folder: Path, model, words: dict[str, int]) -> tuple[str, Path]:
    """A tokenizer of single letters, and a corpus of these words, in shuffled lines that are not held out."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if isinstance(model, models.WordPiece):
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "letters.json"))
    lines = ["held out", *(" ".join([word] * count) for word, count in words.items())]
    return str(folder / "letters.json"), write_jsonl(folder / "words.jsonl", lines)


def added(name: str, out: Path) -> list[str]:
    old, new = load_tokenizer(name), load_tokenizer(out)
    return [new.id_to_token(number) for number in new_pieces(old, new)]


def test_the_most_frequent_pair_comes_first(tmp_path):
    ids = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    name, corpus = letters(tmp_path, models.BPE(ids, []), {"xab": 40, "abc": 30, "xyz": 20})
    extend_tokenizer(name, [corpus], tmp_path / "out", 3)
    assert added(name, tmp_path / "out")[:2] == ["ab", "Ġx"]  # 70 times; 39 + 19 times after a space


def test_a_piece_is_worth_what_it_saves_where_it_needs_no_other(tmp_path):
    """WordPiece: a longer word before a pair that occurs more often, and nothing of the step between."""
    pieces = ["[UNK]", *"abcxyz", *(f"##{letter}" for letter in "abcxyz")]
    model = models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]")
    name, corpus = letters(tmp_path, model, {"abc": 40, "xy": 70, "zz": 2})
    extend_tokenizer(name, [corpus], tmp_path / "out", 2)
    assert added(name, tmp_path / "out") == ["abc", "xy"]  # 2 * 40 and 70 tokens
    assert load_tokenizer(tmp_path / "out").encode("abc xyz").tokens == ["abc", "xy", "##z"]


def test_the_command(tokenizer_folder, tmp_path, capsys):
    corpus = write_jsonl(tmp_path / "d.jsonl", domain(300))
    words = ["extend-tokenizer", "--tokenizer", str(tokenizer_folder), "--input", str(corpus), "--add", "10"]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"{tmp_path / 'out'}: 10 new pieces, 410 ids"
    assert printed[1].startswith("held out: 6 documents, ")
    report = json.loads((tmp_path / "out/fertility.json").read_text())
    before, after = (report[when]["tokens_per_word"] for when in ("before", "after"))
    assert printed[2] == f"tokens per word: {before:.3f} before, {after:.3f} after"
    config = json.loads((tokenizer_folder / "tokenizer_config.json").read_text())
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text()) == config
    assert {path.name for path in tmp_path.iterdir()} == {"d.jsonl", "out"}
    assert main([*words, "--output", str(tmp_path / "again")]) == 0
    same = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("out", "again")]
    assert same[0] == same[1]


@pytest.mark.parametrize(
    ("content", "add", "says"),
    [
        (domain(60), 100_000, r"^the texts yield only [1-9]\d+ of 100,000 new pieces; add text or lower --add$"),
        (["one document"], 1, r"^the texts yield only 0 of 1 new pieces"),
        (None, 1, r"d\.jsonl, line 1: invalid JSON"),
    ],
    ids=["too many", "all held out", "not JSON"],
)
def test_what_is_refused_leaves_nothing(tokenizer_folder, tmp_path, content, add, says):
    corpus = write_jsonl(tmp_path / "d.jsonl", content) if content else tmp_path / "d.jsonl"
    if not content:
        corpus.write_text("x\n")
    with pytest.raises(DetourError, match=says):
        extend_tokenizer(str(tokenizer_folder), [corpus], tmp_path / "out", add)
    assert {path.name for path in tmp_path.iterdir()} == {"d.jsonl"}


def test_a_kind_without_pieces_and_a_used_folder_are_refused(tokenizer_folder, tmp_path):
    corpus = write_jsonl(tmp_path / "d.jsonl", domain(60))
    Tokenizer(models.WordLevel({"a": 0}, "a")).save(str(tmp_path / "words.json"))
    with pytest.raises(DetourError, match=r"words\.json: only byte-level BPE, WordPiece and SentencePiece tokenizers"):
        extend_tokenizer(str(tmp_path / "words.json"), [corpus], tmp_path / "out", 1)
    with pytest.raises(DetourError, match="is not an empty folder"):
        extend_tokenizer(str(tokenizer_folder), [corpus], tmp_path, 1)


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not there; the same is tested on generated text")
def test_a_released_tokenizer_on_real_text(tmp_path):
    name = str(SHARED / "tokenizers/modernbert_rebuilt.tokenizer.json")
    report = extend_tokenizer(name, [SHARED / "corpora/fr_biomed.00.jsonl.gz"], tmp_path / "out", 512)
    assert report["ids"] == {"before": 50_368, "after": 50_880}
    assert report["after"]["tokens"] < 0.9 * report["before"]["tokens"]
    assert load_vocabulary(tmp_path / "out").mask == 50_284
