"""Extension of a tokenizer by the pieces that save most tokens on given texts.

The texts are tokenized, and pairs of neighboring tokens within a word are merged, the most frequent pair first: a merge
saves as many tokens as the pair occurs. This is byte-pair encoding with old pieces instead of bytes, so the
tokenizers library's trainer does it, on a text in which each old piece is one character.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from megatron_detour.corpus.documents import read_documents
from megatron_detour.corpus.sources import find_inputs
from megatron_detour.corpus.train_tokenizer import publish, refuse_used
from megatron_detour.errors import DetourError
from megatron_detour.tokenizer.extension import new_pieces
from megatron_detour.tokenizer.token_bytes import BYTE, SPACE, tokenizer_kind
from megatron_detour.tokenizer.vocabulary import (
    CONFIG,
    Vocabulary,
    companions,
    find_tokenizer,
    library_faults,
    load_tokenizer,
    load_vocabulary,
)

REPORT = "fertility.json"
HELD_OUT = 50  # one document of so many is held out, the first included
BATCH = 100  # documents
FIRST = 0x20000  # the character of id 0; no white space follows
MARGIN = 0.1  # log-probability per token saved, by which a Unigram piece is likelier than the pieces it replaces


def extend_tokenizer(
    name: str, inputs: Sequence[Path], output: Path, add: int, text_key: str = "text", download: bool = False
) -> dict[str, Any]:
    """Add `add` pieces to the tokenizer `name`, write the folder `output` for AutoTokenizer, and return its report.

    Old pieces and special tokens keep their ids, as new_pieces checks. Raises DetourError for a kind of tokenizer that
    cannot be extended, invalid input, a non-empty `output`, and texts too short for so many pieces.
    """
    refuse_used(output)
    old, vocabulary = load_tokenizer(name, download), load_vocabulary(name, download)
    raw = json.loads(old.to_str())
    kind, affixes = tokenizer_kind(raw), ("continuing_subword_prefix", "end_of_word_suffix")
    if kind is None or (kind != "WordPiece" and any(raw["model"].get(affix) for affix in affixes)):
        raise DetourError(f"{name}: only byte-level BPE, WordPiece and SentencePiece tokenizers can be extended")
    held_out: list[str] = []
    with library_faults(f"{name}: cannot be extended"):
        words = _count_words(old, vocabulary, kind, _documents(inputs, text_key, held_out))
        new = _extended(old, raw, vocabulary.size, words, add)
    try:
        new_pieces(old, new)
    except DetourError as reason:
        raise DetourError(f"{name}: cannot be extended: {reason}") from None
    report = {"ids": {"before": vocabulary.size, "after": vocabulary.size + add}} | _fertility(old, new, held_out)
    publish(new, output, _companions(name, download, vocabulary.names(old)) | {REPORT: report})
    return report


def _documents(inputs: Sequence[Path], text_key: str, held_out: list[str]) -> Iterator[str]:
    """Yield the documents, but one in HELD_OUT, which `held_out` gets."""
    names = find_inputs([str(path) for path in inputs])[0]
    texts = (text for name in names for text in read_documents(Path(name), text_key))
    for number, text in enumerate(texts):
        if number % HELD_OUT:
            yield text
        else:
            held_out.append(text)


def _count_words(tokenizer: Tokenizer, vocabulary: Vocabulary, kind: str, texts: Iterator[str]) -> Counter[str]:
    """Return how often each word of several pieces occurs, a word as the characters of its pieces.

    Words are what the pre-tokenizer cuts, and begin with SentencePiece's symbol for a space. Special tokens, added
    tokens, unknown characters and single bytes of SentencePiece are never merged, so they end a word, too.
    """
    spelled = {number: piece for piece, number in tokenizer.get_vocab().items()} if kind == "SentencePiece" else {}
    begins = {number for number, piece in spelled.items() if piece.startswith(SPACE)}
    apart = {number for number, piece in spelled.items() if BYTE.fullmatch(piece)}
    apart |= {*tokenizer.get_added_tokens_decoder(), *vocabulary.special_ids}
    counts: Counter[str] = Counter()
    while batch := [*islice(texts, BATCH)]:
        for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
            line, last = [], None
            for number, word in zip(encoding.ids, encoding.word_ids, strict=True):
                if word != last or number in begins:
                    line.append(" ")
                line.append(" " if number in apart else chr(FIRST + number))
                last = word
            counts.update(word for word in "".join(line).split() if len(word) > 1)
    return counts


def _extended(old: Tokenizer, raw: dict[str, Any], size: int, words: Counter[str], add: int) -> Tokenizer:
    """Return the tokenizer with `add` pieces from id `size` on. Raises DetourError if there are fewer."""
    model, known = raw["model"], set(old.get_vocab())
    prefix = model["continuing_subword_prefix"] if model["type"] == "WordPiece" else ""

    def spell(characters: str) -> str:
        first, *rest = (old.id_to_token(ord(character) - FIRST) for character in characters)
        return first + "".join(piece.removeprefix(prefix) for piece in rest)

    chosen: dict[str, str] = {}  # characters -> piece
    rules: list[list[str]] = []
    for left, right in _candidates(words, add, by_use=model["type"] != "BPE"):
        if len(chosen) == add:
            break
        made = all(len(part) == 1 or part in chosen for part in (left, right))
        piece = spell(left + right)
        if piece not in known and (made or model["type"] != "BPE"):
            known.add(piece)
            chosen[left + right] = piece
        if left + right in chosen:
            rules.append([spell(left), spell(right)])
    if len(chosen) < add:
        raise DetourError(f"the texts yield only {len(chosen):,} of {add:,} new pieces; add text or lower --add")
    if model["type"] == "BPE":
        model["merges"] += rules
    if model["type"] == "Unigram":
        model["vocab"] += _scored(old, model["vocab"], size, chosen)
    else:  # added tokens get ids behind the vocabulary unless it names them
        model["vocab"] |= {token["content"]: token["id"] for token in raw["added_tokens"]}
        model["vocab"] |= {piece: size + number for number, piece in enumerate(chosen.values())}
    return Tokenizer.from_str(json.dumps(raw))


def _candidates(words: Counter[str], add: int, by_use: bool) -> list[tuple[str, str]]:
    """Return more merges than needed: in their order, or `by_use`, by the tokens that their piece saves in the end.

    BPE makes a piece of two others and needs these. Other models do not, and most of them are then of no use.
    """
    alphabet = {character for word in words for character in word}
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=len(alphabet) + 2 * add, min_frequency=2, show_progress=False)
    pairs.train_from_iterator((f"{word} " * count for word, count in words.items()), trainer)
    merges = [(left, right) for left, right in json.loads(pairs.to_str())["model"]["merges"]]
    if not by_use:
        return merges
    saved: Counter[str] = Counter()
    for word, count in words.items():
        for token in pairs.model.tokenize(word):
            saved[token.value] += count * (len(token.value) - 1)
    return sorted(merges, key=lambda merge: -saved["".join(merge)])


def _scored(old: Tokenizer, vocabulary: list[list[Any]], size: int, chosen: dict[str, str]) -> list[list[Any]]:
    """Return what follows a Unigram vocabulary up to id `size`, its added tokens, and the new pieces with scores.

    A new piece is as likely as its old pieces together, and a little more, so that it is used where they were.
    """
    scores = [score for _, score in vocabulary]
    between = [[old.id_to_token(number), min(scores)] for number in range(len(vocabulary), size)]
    for characters, piece in chosen.items():
        score = sum(scores[ord(character) - FIRST] for character in characters) + MARGIN * (len(characters) - 1)
        between.append([piece, float(f"{score:.9g}")])  # as a float32, which SentencePiece computes with
    return between


def _fertility(old: Tokenizer, new: Tokenizer, texts: list[str]) -> dict[str, dict[str, float]]:
    words, size = sum(len(text.split()) for text in texts), sum(len(text.encode()) for text in texts)
    report: dict[str, dict[str, float]] = {"held_out": {"documents": len(texts), "words": words, "bytes": size}}
    for when, tokenizer in (("before", old), ("after", new)):
        tokens = sum(len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts)
        ratios = {"tokens_per_word": tokens / words, "bytes_per_token": size / max(tokens, 1)}
        report[when] = {"tokens": tokens} | {name: round(ratio, 4) for name, ratio in ratios.items()}
    return report


def _companions(name: str, download: bool, named: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return the content of the tokenizer's other files, in which tokenizer_config.json names all special tokens."""
    files = {path.name: content for path, content in companions(name, download).items()}
    fast = {"tokenizer_class": "PreTrainedTokenizerFast"}  # reads a tokenizer.json as it is
    kept = files.get(CONFIG, {}) | (fast if find_tokenizer(name, download).suffix != ".json" else {})
    return files | {CONFIG: fast | named | kept}
