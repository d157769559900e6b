"""Tokenization engines: the fastest that agrees with the reference, Hugging Face's tokenizers.

Before a build, an engine is compared with the reference on a sample of the input and on difficult texts; during the
build, on some of the documents.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_detour.errors import DetourError, brief
from megatron_detour.tokenizer import sentencepiece_model as spm
from megatron_detour.tokenizer.vocabulary import library_faults, load_tokenizer, special_ids_around

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Whitespace that engines treat differently, characters of many planes and recent Unicode versions, and combinations.
TRIALS = (
    "",
    " ",
    "\n\n \t",
    "a\x00b\x1f\x7f",
    "don't I'LL 'ſ 123456789 3.14e-10 %",
    "\u00a0\u2003\u3000\u180e\u200b\u200d\ufeff",
    "e\u0301 é ﬁ ½ Å Å ﷺ",
    "l'œil d’été, « 38,5 °C »…",
    "漢字かな한글 ไทย العربية हिन्दी",
    "😀👨\u200d👩\u200d👧🫨\U0001fae8 \U000323af \U0001e030 \ua7dc \U00011f02",
    "\ue000\U0010ffff\ufffd\ufdd0",
)


class Unsuitable(Exception):
    """An engine cannot run this tokenizer exactly; the message says why."""


class CannotEncode(DetourError):
    """A tokenizer cannot encode a text."""


class Engine(ABC):
    name: str

    @abstractmethod
    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of texts with special tokens, uint32 [tokens], and the offset of each text, int64 [texts + 1].

        Raises CannotEncode.
        """

    def agrees(self, ids: np.ndarray, expected: np.ndarray) -> bool:
        """Return whether ids are equivalent to the reference's."""
        return np.array_equal(ids, expected)


@dataclass(frozen=True)
class EngineChoice:
    """The engine of a build, as its manifest records it."""

    name: str
    version: str
    judged: int  # texts that were compared before the build
    passed_over: dict[str, str] = field(default_factory=dict)  # unsuitable engines, and why


class HuggingFace(Engine):
    """Hugging Face's tokenizers, the reference."""

    name = "tokenizers"

    def __init__(self, tokenizer_file: Path) -> None:
        self._tokenizer = load_tokenizer(tokenizer_file)

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        with _faults():
            return _flat([encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts)])


class Fastokens(Engine):
    """The byte-level BPE engine of the fastokens package."""

    name = "fastokens"

    def __init__(self, tokenizer_file: Path) -> None:
        try:
            import fastokens
        except ImportError:
            raise Unsuitable("the package is not installed") from None
        try:
            self._tokenizer = fastokens.Tokenizer.from_json_str(load_tokenizer(tokenizer_file).to_str())
        except Exception as error:  # of the library, for any unsupported step
            raise Unsuitable(brief(error)) from None

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        with _faults():
            ids, offsets = self._tokenizer.encode_batch_flat(texts, add_special_tokens=True)
        return np.frombuffer(ids, np.uint32), np.frombuffer(offsets, np.uint64).astype(np.int64)


class SentencePiece(Engine):
    """The sentencepiece library, for Unigram models. Of two equally likely segmentations it may choose another one than
    tokenizers; either is correct."""

    name = "sentencepiece"

    def __init__(self, tokenizer_file: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self._reference = load_tokenizer(tokenizer_file)
        raw = json.loads(self._reference.to_str())
        try:
            self._processor = SentencePieceProcessor(model_proto=spm.to_model(raw))
        except spm.NotConvertible as reason:
            raise Unsuitable(str(reason)) from None
        except Exception as error:  # of the library, for a model that it rejects
            raise Unsuitable(brief(error)) from None
        added = {token["id"]: (token["content"], 0.0) for token in raw["added_tokens"]}
        pieces = dict(enumerate(raw["model"]["vocab"])) | added
        self._pieces = [pieces[number] for number in sorted(pieces)]
        self._added = [content for content, _ in added.values()]
        self._first_characters = {content[0] for content in self._added}
        self._prefix, self._suffix = special_ids_around(self._reference)

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        with _faults():
            inner = self._processor.encode(texts, out_type=int, num_threads=1)
            rows = [self._prefix + ids + self._suffix for ids in inner]
            for number, text in enumerate(texts):
                if self._has_added_token(text):  # which the library would split
                    rows[number] = self._reference.encode(text).ids
        return _flat(rows)

    def _has_added_token(self, text: str) -> bool:
        return any(c in text for c in self._first_characters) and any(token in text for token in self._added)

    def agrees(self, ids: np.ndarray, expected: np.ndarray) -> bool:
        return super().agrees(ids, expected) or spm.equally_likely(ids.tolist(), expected.tolist(), self._pieces)


ENGINES: dict[str, Callable[[Path], Engine]] = {e.name: e for e in (Fastokens, SentencePiece, HuggingFace)}


def _flat(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    ids = np.empty(offsets[-1], dtype=np.uint32)
    for row, start, end in zip(rows, offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        ids[start:end] = row
    return ids, offsets


def _faults() -> AbstractContextManager[None]:
    return library_faults("a text cannot be tokenized", CannotEncode)


def choose_engine(wanted: str, tokenizer_file: Path, sample: list[str]) -> EngineChoice:
    """Return the engine `wanted`, or for "auto" the first that agrees with the reference on trials and `sample`.

    Raises DetourError if it does not agree or is not installed.
    """
    reference = HuggingFace(tokenizer_file)
    texts, expected = _encodable(reference, [*trials(load_tokenizer(tokenizer_file)), *sample])
    skipped: dict[str, str] = {}
    for name in ENGINES if wanted == "auto" else [wanted]:
        try:
            if name != reference.name and _differs(ENGINES[name](tokenizer_file), texts, expected) is not None:
                raise Unsuitable(f"its ids differ from those of tokenizers {version('tokenizers')} on a trial text")
            return EngineChoice(name, version(name), len(texts), skipped)
        except (Unsuitable, CannotEncode) as reason:
            skipped[name] = str(reason)
    raise DetourError(f"--engine {wanted}: {skipped[wanted]}; --engine auto chooses one that supports {tokenizer_file}")


def _encodable(reference: Engine, texts: list[str]) -> tuple[list[str], list[np.ndarray]]:
    """Return the texts that the reference can encode, and their ids: without an unknown token it may not cover all
    trials."""
    try:
        return texts, _rows(reference, texts)
    except CannotEncode:
        if len(texts) == 1:
            return [], []
    halves = (texts[: len(texts) // 2], texts[len(texts) // 2 :])
    (first, first_ids), (second, second_ids) = (_encodable(reference, half) for half in halves)
    return first + second, first_ids + second_ids


def trials(tokenizer: Tokenizer) -> list[str]:
    """Return texts on which engines are known to differ, including the tokenizer's added tokens."""
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    spaces = ("", " ", "  ", "\n", "\t ", "\u00a0", "\u2028")
    return [*TRIALS, *(f"a{space}{token}{space}b{token}{token}" for token in added for space in spaces)]


def first_difference(engine: Engine, reference: Engine, texts: list[str]) -> int | None:
    """Return the index of the first text on which the engine disagrees with the reference, or None."""
    return _differs(engine, texts, _rows(reference, texts))


def _differs(engine: Engine, texts: list[str], expected: list[np.ndarray]) -> int | None:
    pairs = zip(_rows(engine, texts), expected, strict=True)
    return next((number for number, pair in enumerate(pairs) if not engine.agrees(*pair)), None)


def _rows(engine: Engine, texts: list[str]) -> list[np.ndarray]:
    """Return the ids of each text."""
    ids, begins = engine.encode(texts)
    return [ids[start:end] for start, end in pairwise(begins.tolist())]


def one_thread() -> None:
    """Disable the engines' threads, as workers are processes. Call it before their first import."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = os.environ["FASTOKENS_BPE_THREADS"] = "1"
