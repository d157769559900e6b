"""Unigram models between SentencePiece's file and Hugging Face's tokenizer.json.

A SentencePiece model becomes the tokenizer that training and release use, and a Unigram tokenizer.json becomes the
model that the sentencepiece library runs, several times as fast as tokenizers does.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_detour.errors import DetourError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SUFFIXES = (".model", ".spm")
SPACE = "▁"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # ModelProto.SentencePiece.Type
UNIGRAM = 1  # TrainerSpec.ModelType
CLS, SEP = ("[CLS]", "<s>"), ("[SEP]", "</s>")


class NoSuchModel(Exception):
    """A tokenizer.json that SentencePiece has no model for; the message says why."""


def tokenizer_of(path: Path) -> Tokenizer:
    """The tokenizers.Tokenizer of a SentencePiece Unigram model, with its [CLS] and [SEP] or <s> and </s> around texts.

    Raises DetourError for other models.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    model = _read(path)
    if model.trainer_spec.model_type != UNIGRAM:
        raise DetourError(
            f"{path}: only Unigram models of SentencePiece are read directly; load this one with transformers' "
            "AutoTokenizer, save it with save_pretrained and give that folder"
        )
    # Nine digits tell a float32 exactly, and unlike more of them they come out of tokenizer.json as they went in.
    pieces = [(piece.piece, float(f"{piece.score:.9g}")) for piece in model.pieces]
    kinds = [piece.type for piece in model.pieces]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=kinds.index(UNKNOWN), byte_fallback=BYTE in kinds))
    steps = []
    if model.normalizer_spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap))
    if model.normalizer_spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    scheme = "always" if model.normalizer_spec.add_dummy_prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(SPACE, prepend_scheme=scheme)
    special = [name for (name, _), kind in zip(pieces, kinds, strict=True) if kind in (UNKNOWN, CONTROL, USER_DEFINED)]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    tokenizer.post_processor = _template(tokenizer)
    return tokenizer


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
            case {"type": "Metaspace", "replacement": "▁"}:
                spec.add_dummy_prefix = step.get("prepend_scheme", "always") != "never"
            case _:
                raise NoSuchModel(f"SentencePiece has no step like {step['type']}")
