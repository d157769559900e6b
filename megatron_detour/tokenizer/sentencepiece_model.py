"""Unigram models between SentencePiece's file and Hugging Face's tokenizer.json.

A SentencePiece model becomes the tokenizer that training and release use, and a Unigram tokenizer.json becomes the
model that the sentencepiece library runs, several times as fast as tokenizers does.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_detour.errors import DetourError, brief

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SUFFIXES = (".model", ".spm")
SPACE = "▁"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # ModelProto.SentencePiece.Type
UNIGRAM = 1  # TrainerSpec.ModelType
SCORE_TOLERANCE = 1e-3  # of a text's sum of float32 log probabilities
ENDS = r"\A +| +\z"
TRIALS = 1_600  # pieces in trial texts
SPACES = ("", " ", "  ", "\n", "\t ", "\u00a0", "\u3000")
SYMBOL_FORMS = ("@", "a@b", "a @ b", " @@. @")
CLS, SEP = ("[CLS]", "<s>"), ("[SEP]", "</s>")
MARKS = (*CLS, *SEP, "[MASK]", "<mask>", "[PAD]", "<pad>", "[UNK]", "<unk>")


class NoSuchModel(Exception):
    """A tokenizer.json that SentencePiece has no model for; the message says why."""


def tokenizer_of(path: Path) -> Tokenizer:
    """The tokenizers.Tokenizer of a SentencePiece Unigram model, with its [CLS] and [SEP] or <s> and </s> around texts.

    Raises DetourError for other models, and for options with which its ids would not be SentencePiece's own.
    """
    model = _read(path)
    if model.trainer_spec.model_type != UNIGRAM:
        raise DetourError(
            f"{path}: only Unigram models of SentencePiece are read directly; load this one with transformers' "
            "AutoTokenizer, save it with save_pretrained and give that folder"
        )
    if not any(piece.type == UNKNOWN for piece in model.pieces):
        raise DetourError(f"{path}: the SentencePiece model has no unknown token")
    _compare(path, path.stat().st_mtime_ns)
    return _made_of(model)


def _made_of(model: Any) -> Tokenizer:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces, spec = _scored(model), model.normalizer_spec
    kinds = [piece.type for piece in model.pieces]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=kinds.index(UNKNOWN), byte_fallback=BYTE in kinds))
    steps = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    all_white_is_space = spec.name.startswith("nmt_")
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Strip() if all_white_is_space else normalizers.Replace(Regex(ENDS), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    # Metaspace adds no prefix to a text that begins with a space or with its sign.
    begins_with_neither = spec.remove_extra_whitespaces and all_white_is_space
    if spec.add_dummy_prefix and not begins_with_neither:
        steps.append(normalizers.Prepend(SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    scheme = "always" if spec.add_dummy_prefix else "never"
    # Pieces may go on over spaces (split_by_whitespace=false) or be several of them.
    split = not any(SPACE in name[1:] for (name, _), kind in zip(pieces, kinds, strict=True) if kind == NORMAL)
    prepend = scheme if begins_with_neither else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=prepend, split=split)
    tokenizer.decoder = decoders.Metaspace(SPACE, prepend_scheme=scheme)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in _special(model)])
    tokenizer.post_processor = _template(tokenizer)
    return tokenizer


def _scored(model: Any) -> list[tuple[str, float]]:
    """The pieces with their scores; a user-defined symbol wins over all ways to spell it, as in SentencePiece."""
    best = max((piece.score for piece in model.pieces if piece.type == NORMAL), default=0.0)
    scored = []
    for piece in model.pieces:
        symbol = piece.type == USER_DEFINED and piece.piece not in MARKS
        score = len(piece.piece.encode()) * best - 0.1 if symbol else piece.score
        # Nine digits tell a float32 exactly, and unlike more of them they come out of tokenizer.json as they went in.
        scored.append((piece.piece, float(f"{score:.9g}")))
    return scored


def _special(model: Any) -> list[str]:
    """Pieces that stand for no text, a user-defined [MASK] among them; other user-defined symbols are text."""
    special = (UNKNOWN, CONTROL)
    return [p.piece for p in model.pieces if p.type in special or (p.type == USER_DEFINED and p.piece in MARKS)]


@lru_cache(maxsize=8)
def _compare(path: Path, changed: int) -> None:
    """Raises DetourError where the tokenizer that is made of a model gives other ids than SentencePiece itself."""
    from sentencepiece import SentencePieceProcessor

    model = _read(path)
    try:
        original = SentencePieceProcessor(model_proto=model.SerializeToString())
    except Exception as error:  # of the library, for a model that it refuses
        raise DetourError(f"{path}: not a model that SentencePiece opens: {brief(error)}") from None
    made, pieces = _made_of(model), _scored(model)
    for text in _trial_texts(model):
        ours, theirs = made.encode(text, add_special_tokens=False).ids, original.encode(text)
        if ours != theirs and not as_likely(ours, theirs, pieces):
            raise DetourError(
                f"{path}: a tokenizer.json made of it would give other ids than SentencePiece; it was trained with "
                f"{_unusual(model)}, which is not supported here: train it without, or use another model"
            )


def as_likely(ids: list[int], others: list[int], pieces: Sequence[tuple[str, float]]) -> bool:
    """Whether two segmentations are of the same text and of equal probability, so that either is right."""
    same_text = "".join(pieces[i][0] for i in ids) == "".join(pieces[i][0] for i in others)
    return same_text and abs(sum(pieces[i][1] for i in ids) - sum(pieces[i][1] for i in others)) < SCORE_TOLERANCE


def _trial_texts(model: Any) -> list[str]:
    """Texts of the model's own pieces, white space, unknown characters, and user-defined symbols beside all of them."""
    special = _special(model)
    normal = [piece.piece for piece in model.pieces if piece.type == NORMAL]
    some = normal[:: len(normal) // TRIALS + 1]
    texts = ["".join(some[start : start + 8]) for start in range(0, len(some), 8)]
    symbols = [piece.piece for piece in model.pieces if piece.type == USER_DEFINED and piece.piece not in MARKS]
    texts += [form.replace("@", symbol) for symbol in symbols[:TRIALS] for form in SYMBOL_FORMS]
    texts += [
        f"{a}{text}{b}".replace(SPACE, " ")
        for text in (*some[:20], "漢字 ﬁ ½", "Ü 🧬🧬")
        for a in SPACES
        for b in SPACES
    ]
    return [text for text in texts if not any(name in text for name in special)]


def _unusual(model: Any) -> str:
    """The options of a model that are not as usual, by their names."""
    trainer, spec = model.trainer_spec, model.normalizer_spec
    symbols = [piece.piece for piece in model.pieces if piece.type == USER_DEFINED and piece.piece not in MARKS]
    found = {
        "treat_whitespace_as_suffix=true": trainer.treat_whitespace_as_suffix,
        "split_by_whitespace=false": not trainer.split_by_whitespace,
        "escape_whitespaces=false": not spec.escape_whitespaces,
        "remove_extra_whitespaces=false": not spec.remove_extra_whitespaces,
        "add_dummy_prefix=false": not spec.add_dummy_prefix,
        f"user_defined_symbols={','.join(symbols[:3])}": bool(symbols),
    }
    names = [name for name, unusual in found.items() if unusual]
    return ", ".join(names) or f"normalization_rule_name={spec.name or 'of its own'}"


def _read(path: Path) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        raise DetourError(f"{path}: not a SentencePiece model") from None
    return model


def _template(tokenizer: Tokenizer) -> Any:
    from tokenizers import processors

    known = tokenizer.get_vocab()
    cls, sep = (next((name for name in names if name in known), None) for names in (CLS, SEP))
    around = [(name, known[name]) for name in (cls, sep) if name is not None]
    single = " ".join(part for part in (cls and f"{cls}:0", "$A:0", sep and f"{sep}:0") if part)
    pair = " ".join(part for part in (single, "$B:0", sep and f"{sep}:0") if part)
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=around)


def model_of(tokenizer: dict[str, Any]) -> bytes:
    """The serialised ModelProto that a Unigram tokenizer.json stands for, ids unchanged. Raises NoSuchModel."""
    from sentencepiece import sentencepiece_model_pb2

    raw = tokenizer["model"]
    if raw.get("type") != "Unigram":
        raise NoSuchModel(f"the model is {raw.get('type')}, not Unigram")
    if raw.get("unk_id") is None:
        raise NoSuchModel("the model has no unknown token, which SentencePiece needs")
    model = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.model_type = UNIGRAM
    model.trainer_spec.unk_id = raw["unk_id"]
    model.trainer_spec.bos_id = model.trainer_spec.eos_id = model.trainer_spec.pad_id = -1
    model.trainer_spec.byte_fallback = bool(raw.get("byte_fallback"))
    added = {token["content"] for token in tokenizer.get("added_tokens", [])}
    for number, (piece, score) in enumerate(raw["vocab"]):
        model.pieces.add(piece=piece, score=score, type=_kind(number, piece, raw, added))
    steps = _flat(tokenizer.get("normalizer"), "normalizers") + _flat(tokenizer.get("pre_tokenizer"), "pretokenizers")
    _set_normalisation(model.normalizer_spec, steps)
    return model.SerializeToString()


def _kind(number: int, piece: str, raw: dict[str, Any], added: set[str]) -> int:
    if number == raw["unk_id"]:
        return UNKNOWN
    if raw.get("byte_fallback") and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return BYTE
    return CONTROL if piece in added else NORMAL


def _flat(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return [s for part in step[inner] for s in _flat(part, inner)] if step["type"] == "Sequence" else [step]


def _set_normalisation(spec: Any, steps: list[dict[str, Any]]) -> None:
    spec.add_dummy_prefix = spec.remove_extra_whitespaces = False
    spec.escape_whitespaces = True
    for step in steps:
        match step:
            case {"type": "Precompiled", "precompiled_charsmap": charsmap}:
                spec.precompiled_charsmap = base64.b64decode(charsmap)
            case {"type": "Strip"} | {"type": "WhitespaceSplit"} | {"type": "Replace", "pattern": {"Regex": " {2,}"}}:
                spec.remove_extra_whitespaces = True
            case {"type": "Replace", "pattern": {"Regex": pattern}} if pattern == ENDS:
                spec.remove_extra_whitespaces = True
            case {"type": "Prepend", "prepend": "▁"}:
                spec.add_dummy_prefix = True
            case {"type": "Metaspace", "replacement": "▁"}:
                spec.add_dummy_prefix |= step.get("prepend_scheme", "always") != "never"
            case _:
                raise NoSuchModel(f"SentencePiece has no step like {step['type']}")
