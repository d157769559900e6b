"""Engines turn texts into ids: the fastest that agrees with Hugging Face's tokenizers, which is the judge.

An engine is tried at the start on a sample of the user's own text and on texts that are made to differ; while a build
goes on, the judge looks at some of its documents again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from megatron_detour.errors import DetourError, brief
from megatron_detour.tokenizer import sentencepiece_model as spm
from megatron_detour.tokenizer.vocabulary import library_faults, load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PROBES = 1_000  # tokens that are tried for one that a text gives
# White space that engines see differently, characters of many planes and of late versions of Unicode, and combinations.
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
    """An engine that cannot run this tokenizer, or not exactly; the message says why."""


class CannotEncode(DetourError):
    """A text that a tokenizer has no ids for, or that is too much for it."""


class Engine(Protocol):
    name: str

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of texts, special tokens around each: uint32 [tokens], and int64 [texts + 1], where each begins.

        Raises CannotEncode.
        """
        ...

    def agrees(self, ids: np.ndarray, judged: np.ndarray) -> bool:
        """Whether ids are as good as the judge's own."""
        ...


@dataclass(frozen=True)
class Chosen:
    """The engine of a build, for its manifest."""

    name: str
    version: str
    judged: int  # texts that were compared before the build
    passed_over: dict[str, str] = field(default_factory=dict)  # engines that did not serve, and why


class HuggingFace:
    """tokenizers itself."""

    name = "tokenizers"

    def __init__(self, tokenizer_file: Path) -> None:
        self._tokenizer = load_tokenizer(tokenizer_file)

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        with _faults():
            return _flat([encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts)])

    def agrees(self, ids: np.ndarray, judged: np.ndarray) -> bool:
        return np.array_equal(ids, judged)


class Fastokens:
    """The byte-level BPE engine of the fastokens package."""

    name = "fastokens"

    def __init__(self, tokenizer_file: Path) -> None:
        try:
            import fastokens
        except ImportError:
            raise Unsuitable("the package is not installed") from None
        try:
            self._tokenizer = fastokens.Tokenizer.from_json_str(load_tokenizer(tokenizer_file).to_str())
        except Exception as error:  # of the library's own making, for each step that it does not know
            raise Unsuitable(brief(error)) from None

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        with _faults():
            ids, offsets = self._tokenizer.encode_batch_flat(texts, add_special_tokens=True)
        return np.frombuffer(ids, np.uint32), np.frombuffer(offsets, np.uint64).astype(np.int64)

    def agrees(self, ids: np.ndarray, judged: np.ndarray) -> bool:
        return np.array_equal(ids, judged)


class SentencePiece:
    """The sentencepiece library on a Unigram model. It is the reference of such models: where two segmentations are
    equally likely it may choose the other one than tokenizers does, and both are right."""

    name = "sentencepiece"

    def __init__(self, tokenizer_file: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self._judge = load_tokenizer(tokenizer_file)
        raw = json.loads(self._judge.to_str())
        try:
            self._processor = SentencePieceProcessor(model_proto=spm.model_of(raw))
        except spm.NoSuchModel as reason:
            raise Unsuitable(str(reason)) from None
        except Exception as error:  # of the library, for a model that it refuses
            raise Unsuitable(brief(error)) from None
        added = {token["id"]: (token["content"], 0.0) for token in raw["added_tokens"]}
        pieces = dict(enumerate(raw["model"]["vocab"])) | added
        self._pieces = [pieces[number] for number in sorted(pieces)]
        self._added = [content for content, _ in added.values()]
        self._first_characters = {content[0] for content in self._added}
        self._prefix, self._suffix = special_ids_around(self._judge)

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        with _faults():
            inner = self._processor.encode(texts, out_type=int, num_threads=1)
            rows = [self._prefix + ids + self._suffix for ids in inner]
            for number, text in enumerate(texts):
                if self._holds_added_token(text):  # which the library would cut into pieces
                    rows[number] = self._judge.encode(text).ids
        return _flat(rows)

    def _holds_added_token(self, text: str) -> bool:
        return any(c in text for c in self._first_characters) and any(token in text for token in self._added)

    def agrees(self, ids: np.ndarray, judged: np.ndarray) -> bool:
        if np.array_equal(ids, judged):
            return True
        return spm.as_likely(ids.tolist(), judged.tolist(), self._pieces)


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


def special_ids_around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The special ids before and after a text. Raises DetourError for a tokenizer that makes nothing of any text."""
    for text in _probes(tokenizer):
        with suppress(CannotEncode), _faults():
            encoding = tokenizer.encode(text)
            inside = [number for number, special in enumerate(encoding.special_tokens_mask) if not special]
            if inside:
                return encoding.ids[: inside[0]], encoding.ids[inside[-1] + 1 :]
    raise DetourError("the tokenizer makes no token of any text; does its vocabulary hold more than special tokens?")


def _probes(tokenizer: Tokenizer) -> Iterator[str]:
    """Texts of which one should be a token."""
    yield "a"
    special = tokenizer.get_added_tokens_decoder()
    ids = sorted(number for number in tokenizer.get_vocab().values() if number not in special)
    for number in ids[:PROBES]:
        with suppress(CannotEncode), _faults():
            yield tokenizer.decode([number])


def choose_engine(wanted: str, tokenizer_file: Path, sample: list[str]) -> Chosen:
    """The engine `wanted`, or for "auto" the first that gives the judge's ids on `sample`. Raises DetourError."""
    judge = HuggingFace(tokenizer_file)
    texts = _encodable(judge, [*trials(load_tokenizer(tokenizer_file)), *sample])
    passed_over: dict[str, str] = {}
    for name in ENGINES if wanted == "auto" else [wanted]:
        try:
            if name != judge.name and first_difference(ENGINES[name](tokenizer_file), judge, texts) is not None:
                raise Unsuitable(f"its ids are not those of tokenizers {version('tokenizers')} on a trial text")
            return Chosen(name, version(name), len(texts), passed_over)
        except (Unsuitable, CannotEncode) as reason:
            passed_over[name] = str(reason)
    raise DetourError(f"--engine {wanted}: {passed_over[wanted]}; --engine auto takes one that serves {tokenizer_file}")


def _encodable(judge: Engine, texts: list[str]) -> list[str]:
    """The texts that the judge has ids for: a vocabulary without an unknown token does not have to know all trials."""
    try:
        judge.encode(texts)
    except CannotEncode:
        if len(texts) == 1:
            return []
        middle = len(texts) // 2
        return _encodable(judge, texts[:middle]) + _encodable(judge, texts[middle:])
    return texts


def trials(tokenizer: Tokenizer) -> list[str]:
    """Texts on which engines are known to differ, those with the tokenizer's own added tokens among them."""
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    spaces = ("", " ", "  ", "\n", "\t ", "\u00a0", "\u2028")
    return [*TRIALS, *(f"a{space}{token}{space}b{token}{token}" for token in added for space in spaces)]


def first_difference(engine: Engine, judge: Engine, texts: list[str]) -> int | None:
    """The number of the first text on which the engine's ids are not as good as the judge's."""
    ids, begins = engine.encode(texts)
    expected, expected_begins = judge.encode(texts)
    for number in range(len(texts)):
        ours = ids[begins[number] : begins[number + 1]]
        theirs = expected[expected_begins[number] : expected_begins[number + 1]]
        if not engine.agrees(ours, theirs):
            return number
    return None


def one_thread() -> None:
    """Workers are processes: an engine's own threads would only be in each other's way. Before its first import."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = os.environ["FASTOKENS_BPE_THREADS"] = "1"
