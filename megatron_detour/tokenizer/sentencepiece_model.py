"""Conversion between SentencePiece's file, of a Unigram or BPE model, and Hugging Face's tokenizer.json.

A SentencePiece model becomes the tokenizer that training and release use, and a Unigram tokenizer.json becomes a model
for the sentencepiece library, which is several times as fast as tokenizers.
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
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
SCORE_TOLERANCE = 1e-3  # of a text's sum of float32 log-probabilities
ENDS = r"\A +| +\z"
TRIALS = 1_600  # pieces in trial texts
SPACES = ("", " ", "  ", "\n", "\t ", "\u00a0", "\u3000")
SYMBOL_FORMS = ("@", "a@b", "a @ b", " @@. @")
CLS, SEP = ("[CLS]", "<s>"), ("[SEP]", "</s>")
MARKS = (*CLS, *SEP, "[MASK]", "<mask>", "[PAD]", "<pad>", "[UNK]", "<unk>")


class NotConvertible(Exception):
    """A tokenizer.json has no equivalent SentencePiece model; the message says why."""


def to_tokenizer(path: Path) -> Tokenizer:
    """Convert a SentencePiece model to a tokenizers.Tokenizer, which adds its [CLS] and [SEP], or its begin and end.

    Raises DetourError for other models, and for options with which the ids would differ from SentencePiece's.
    """
    model = _read(path)
    if model.trainer_spec.model_type not in (UNIGRAM, BPE):
        raise DetourError(
            f"{path}: only Unigram and BPE models of SentencePiece are supported; load this one with transformers' "
            "AutoTokenizer, save it with save_pretrained and use that folder"
        )
    if not any(piece.type == UNKNOWN for piece in model.pieces):
        raise DetourError(f"{path}: the SentencePiece model has no unknown token")
    _compare(path, path.stat().st_mtime_ns)
    return _convert(model)


def special_tokens(path: Path) -> dict[str, str]:
    """Return a SentencePiece model's special tokens by role: cls, sep, pad and unk, where it has them."""
    return _roles(_read(path))


def _roles(model: Any) -> dict[str, str]:
    """Return special tokens by role: [CLS] and [SEP] if it has them, else what it was trained with."""
    spec, special = model.trainer_spec, _special(model)
    ids = {"cls": spec.bos_id, "sep": spec.eos_id, "pad": spec.pad_id, "unk": spec.unk_id}
    names = {role: model.pieces[number].piece for role, number in ids.items() if 0 <= number < len(model.pieces)}
    for role, (usual, other) in (("cls", CLS), ("sep", SEP)):
        names[role] = next((name for name in (usual, names.get(role), other) if name in special), "")
    return {role: name for role, name in names.items() if name in special}


def _convert(model: Any) -> Tokenizer:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces, spec = _scored(model), model.normalizer_spec
    kinds = [piece.type for piece in model.pieces]
    unknown, falls_back = kinds.index(UNKNOWN), BYTE in kinds
    if model.trainer_spec.model_type == BPE:
        ids = {name: number for number, (name, _) in enumerate(pieces)}
        unk = {"unk_token": pieces[unknown][0], "fuse_unk": True}
        tokenizer = Tokenizer(models.BPE(ids, _merges(model), byte_fallback=falls_back, **unk))
    else:
        tokenizer = Tokenizer(models.Unigram(pieces, unk_id=unknown, byte_fallback=falls_back))
    steps = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    all_white_is_space = spec.name.startswith("nmt_")
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Strip() if all_white_is_space else normalizers.Replace(Regex(ENDS), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    # Metaspace adds no prefix to a text that begins with a space or its symbol.
    begins_with_neither = spec.remove_extra_whitespaces and all_white_is_space
    if spec.add_dummy_prefix and not begins_with_neither:
        steps.append(normalizers.Prepend(SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    scheme = "always" if spec.add_dummy_prefix else "never"
    # Pieces may span spaces (split_by_whitespace=false) or consist of several.
    split = not any(SPACE in name[1:] for (name, _), kind in zip(pieces, kinds, strict=True) if kind == NORMAL)
    prepend = scheme if begins_with_neither else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=prepend, split=split)
    tokenizer.decoder = decoders.Metaspace(SPACE, prepend_scheme=scheme)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in _special(model)])
    tokenizer.post_processor = _template(tokenizer, _roles(model))
    return tokenizer


def _merges(model: Any) -> list[tuple[str, str]]:
    """Return the merges of a BPE model: SentencePiece makes the best piece first, of whichever two pieces."""
    normal = {piece.piece: piece.score for piece in model.pieces if piece.type == NORMAL}
    best_first = sorted(normal, key=normal.get, reverse=True)
    cuts = ((name[:cut], name[cut:]) for name in best_first for cut in range(1, len(name)))
    return [(left, right) for left, right in cuts if left in normal and right in normal]


def _scored(model: Any) -> list[tuple[str, float]]:
    """Return pieces and scores; a user-defined symbol beats any segmentation of it, as in SentencePiece."""
    best = max((piece.score for piece in model.pieces if piece.type == NORMAL), default=0.0)
    scored = []
    for piece in model.pieces:
        symbol = piece.type == USER_DEFINED and piece.piece not in MARKS
        score = len(piece.piece.encode()) * best - 0.1 if symbol else piece.score
        # Nine digits represent a float32 exactly and, unlike more digits, survive a round trip through tokenizer.json.
        scored.append((piece.piece, float(f"{score:.9g}")))
    return scored


def _special(model: Any) -> list[str]:
    """Return pieces that represent no text, including a user-defined [MASK]; other user-defined symbols are text."""
    special = (UNKNOWN, CONTROL)
    return [p.piece for p in model.pieces if p.type in special or (p.type == USER_DEFINED and p.piece in MARKS)]


@lru_cache(maxsize=8)
def _compare(path: Path, modified: int) -> None:
    """Raise DetourError if the converted tokenizer gives other ids than SentencePiece. `modified` is a cache key."""
    from sentencepiece import SentencePieceProcessor

    model = _read(path)
    try:
        original = SentencePieceProcessor(model_proto=model.SerializeToString())
    except Exception as error:  # of the library, for a model that it rejects
        raise DetourError(f"{path}: SentencePiece cannot open this model: {brief(error)}") from None
    converted, pieces = _convert(model), _scored(model)
    may_differ = model.trainer_spec.model_type == UNIGRAM
    for text in _trial_texts(model):
        ids, expected = converted.encode(text, add_special_tokens=False).ids, original.encode(text)
        if ids != expected and not (may_differ and equally_likely(ids, expected, pieces)):
            raise DetourError(
                f"{path}: an equivalent tokenizer.json would give other ids than SentencePiece; the model was trained "
                f"with {_unusual(model)}, which is not supported: train it without, or use another model"
            )


def equally_likely(ids: list[int], expected: list[int], pieces: Sequence[tuple[str, float]]) -> bool:
    """Return whether two segmentations have the same text and the same probability, so that either is correct."""
    same_text = "".join(pieces[i][0] for i in ids) == "".join(pieces[i][0] for i in expected)
    return same_text and abs(sum(pieces[i][1] for i in ids) - sum(pieces[i][1] for i in expected)) < SCORE_TOLERANCE


def _trial_texts(model: Any) -> list[str]:
    """Return texts of the model's pieces, whitespace, unknown characters and user-defined symbols in all contexts."""
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
    """Return the names and values of a model's unusual options."""
    trainer, spec = model.trainer_spec, model.normalizer_spec
    symbols = [piece.piece for piece in model.pieces if piece.type == USER_DEFINED and piece.piece not in MARKS]
    options = {
        "treat_whitespace_as_suffix=true": trainer.treat_whitespace_as_suffix,
        "split_by_whitespace=false": not trainer.split_by_whitespace,
        "escape_whitespaces=false": not spec.escape_whitespaces,
        "remove_extra_whitespaces=false": not spec.remove_extra_whitespaces,
        "add_dummy_prefix=false": not spec.add_dummy_prefix,
        f"user_defined_symbols={','.join(symbols[:3])}": bool(symbols),
    }
    names = [name for name, unusual in options.items() if unusual]
    return ", ".join(names) or f"normalization_rule_name={spec.name or 'custom'}"


def _read(path: Path) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        raise DetourError(f"{path}: not a SentencePiece model") from None
    return model


def _template(tokenizer: Tokenizer, roles: dict[str, str]) -> Any:
    from tokenizers import processors

    cls, sep = (f"{roles[role]}:0" if role in roles else "" for role in ("cls", "sep"))
    around = [(roles[role], tokenizer.token_to_id(roles[role])) for role in ("cls", "sep") if role in roles]
    single = f"{cls} $A:0 {sep}".split()
    return processors.TemplateProcessing(single=single, pair=[*single, "$B:0", *sep.split()], special_tokens=around)


def to_model(tokenizer: dict[str, Any]) -> bytes:
    """Convert a Unigram tokenizer.json to a serialized ModelProto with the same ids. Raises NotConvertible."""
    from sentencepiece import sentencepiece_model_pb2

    raw = tokenizer["model"]
    if raw.get("type") != "Unigram":
        raise NotConvertible(f"the model is {raw.get('type')}, not Unigram")
    if raw.get("unk_id") is None:
        raise NotConvertible("the model has no unknown token, which SentencePiece requires")
    model = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.model_type = UNIGRAM
    model.trainer_spec.unk_id = raw["unk_id"]
    model.trainer_spec.bos_id = model.trainer_spec.eos_id = model.trainer_spec.pad_id = -1
    model.trainer_spec.byte_fallback = bool(raw.get("byte_fallback"))
    added = {token["content"] for token in tokenizer.get("added_tokens", [])}
    for number, (piece, score) in enumerate(raw["vocab"]):
        model.pieces.add(piece=piece, score=score, type=_kind(number, piece, raw, added))
    steps = _flat(tokenizer.get("normalizer"), "normalizers") + _flat(tokenizer.get("pre_tokenizer"), "pretokenizers")
    _set_normalization(model.normalizer_spec, steps)
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


def _set_normalization(spec: Any, steps: list[dict[str, Any]]) -> None:
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
                raise NotConvertible(f"SentencePiece has no equivalent of {step['type']}")
