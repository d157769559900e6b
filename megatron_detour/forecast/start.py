"""The shape and the vocabulary that a run starts from, looked up without torch and without transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_detour.config import Model
from megatron_detour.data.vocabulary import Vocabulary, hub_file, load_vocabulary
from megatron_detour.errors import DetourError
from megatron_detour.model.shape import Shape

# Of transformers' ModernBertConfig; a shape to initialise gives what differs. It is ModernBERT-base's.
DEFAULTS = {
    "model_type": "modernbert",
    "vocab_size": 50_368,
    "hidden_size": 768,
    "intermediate_size": 1_152,
    "num_hidden_layers": 22,
    "num_attention_heads": 12,
}
LARGE = {"hidden_size": 1_024, "intermediate_size": 2_624, "num_hidden_layers": 28, "num_attention_heads": 16}
PUBLISHED = {  # so that a plan can be made before a model of the recipes is fetched
    "answerdotai/ModernBERT-base": DEFAULTS,
    "answerdotai/ModernBERT-large": DEFAULTS | LARGE,
    "almanach/moderncamembert-base": DEFAULTS | {"vocab_size": 32_768},
    "almanach/moderncamembert-large": DEFAULTS | LARGE | {"vocab_size": 32_768},
}
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class Start:
    """What could be found, and what was not there."""

    shape: Shape | None
    vocabulary: Vocabulary | None
    faults: tuple[str, ...] = ()
    note: str = ""  # where the shape comes from, if not from the model itself


def look(model: Model) -> Start:
    """Nothing is fetched unless model.download allows it."""
    faults: list[str] = []
    vocabulary = _vocabulary(model, faults)
    shape, note = _started(model, faults) if model.start else (_fresh(model, vocabulary, faults), "")
    if shape and vocabulary and vocabulary.size > shape.vocabulary:
        faults.append(
            f"model.tokenizer: {model.tokenizer or model.start}: the tokenizer has {vocabulary.size:,} ids, the "
            f"model's embedding only {shape.vocabulary:,}; give the tokenizer that belongs to the model"
        )
    return Start(shape, vocabulary, tuple(faults), note)


def _started(model: Model, faults: list[str]) -> tuple[Shape | None, str]:
    try:
        shape = Shape.of(_config(model), model.start)
    except DetourError as fault:
        faults.append(f"model.start: {fault}")
        known = PUBLISHED.get(model.start)
        return (Shape.of(known, model.start), "as published; the model is not here") if known else (None, "")
    if not model.download and not any(_has(model.start, name) for name in WEIGHTS):
        where = "the folder" if Path(model.start).is_dir() else "the hub's local cache"
        faults.append(f"model.start: {model.start}: {where} has no {WEIGHTS[0]}; download the model again")
    return shape, ""


def _has(start: str, name: str) -> bool:
    if Path(start).is_dir():
        return (Path(start) / name).is_file()
    try:
        return hub_file(start, name, False, "model").is_file()
    except DetourError:
        return False


def _config(model: Model) -> dict[str, Any]:
    folder = Path(model.start)
    path = folder / "config.json" if folder.is_dir() else hub_file(model.start, "config.json", model.download, "model")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DetourError(f"{folder}: the folder has no config.json, so it is not a Hugging Face model") from None
    except (OSError, ValueError):
        raise DetourError(f"{path}: not a JSON file") from None
    if not isinstance(config, dict):
        raise DetourError(f"{path}: not a model's configuration")
    return config


def _fresh(model: Model, vocabulary: Vocabulary | None, faults: list[str]) -> Shape | None:
    size = {"vocab_size": vocabulary.size} if vocabulary else {}
    try:
        return Shape.of(DEFAULTS | size | model.config, "model.config")
    except DetourError as fault:
        faults.append(str(fault))
        return None


def _vocabulary(model: Model, faults: list[str]) -> Vocabulary | None:
    name = model.tokenizer or model.start
    try:
        vocabulary = load_vocabulary(name, model.download)
        if model.tokenizer and model.start and _differs(model, vocabulary):
            faults.append(
                f"model.tokenizer: {model.tokenizer} is not the tokenizer that {model.start} was trained with; remove "
                "the key to use the model's own"
            )
    except DetourError as fault:
        if model.tokenizer:  # else it is the model that is not there, which is told once
            faults.append(f"model.tokenizer: {fault}")
        elif Path(name).is_dir():
            faults.append(f"model.start: {fault}")
        return None
    missing = [f"[{role.upper()}]" for role in ("mask", "pad") if getattr(vocabulary, role) is None]
    if missing:
        faults.append(f"{name}: the tokenizer has no {' and no '.join(missing)}; masked training needs both")
    return vocabulary


def _differs(model: Model, vocabulary: Vocabulary) -> bool:
    try:
        return load_vocabulary(model.start, model.download).sha256 != vocabulary.sha256
    except DetourError:
        return False
