"""The shape and the vocabulary that a run starts from, looked up without torch and without transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_detour.checkpoint.source import WEIGHTS, WEIGHTS_INDEX, Source, StoredWeights, weight_sizes
from megatron_detour.config import Model
from megatron_detour.errors import DetourError
from megatron_detour.model.shape import Shape, refuse_unknown_keys
from megatron_detour.objectives import KINDS
from megatron_detour.tokenizer.vocabulary import Vocabulary, find_tokenizer, load_vocabulary
from megatron_detour.tokenizer.word_boundaries import Words

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


@dataclass(frozen=True)
class Start:
    """What could be found, and what was not there."""

    shape: Shape | None
    vocabulary: Vocabulary | None
    faults: tuple[str, ...] = ()
    note: str = ""  # where the shape comes from, if not from the model itself


def look(model: Model, whole_words: bool = False) -> Start:
    """Nothing is fetched unless model.download allows it. `whole_words`: a phase masks them."""
    faults: list[str] = []
    vocabulary = _vocabulary(model, faults)
    if whole_words and vocabulary:
        try:
            Words.of(find_tokenizer(model.tokenizer or model.start, model.download), vocabulary)
        except DetourError as fault:
            faults.append(str(fault))
    shape, note = _started(model, faults) if model.start else (_fresh(model, vocabulary, faults), "")
    if shape and vocabulary and vocabulary.size > shape.vocabulary:
        faults.append(
            f"model.tokenizer: {model.tokenizer or model.start}: the tokenizer has {vocabulary.size:,} ids, the "
            f"model's embedding only {shape.vocabulary:,}; give the tokenizer that belongs to the model"
        )
    return Start(shape, vocabulary, tuple(faults), note)


def _started(model: Model, faults: list[str]) -> tuple[Shape | None, str]:
    source = Source(model.start, model.download)
    try:
        shape = Shape.of(source.config(), model.start)
    except DetourError as fault:
        faults.append(f"model.start: {fault}")
        known = PUBLISHED.get(model.start)
        return (Shape.of(known, model.start), "as published; the model is not here") if known else (None, "")
    here = Source(model.start)  # weights are large: a plan leaves them to the run
    if not model.download or any(here.has(name) for name in (WEIGHTS, WEIGHTS_INDEX)):
        try:
            StoredWeights.of(here).check(weight_sizes(shape), model.start)
        except DetourError as fault:
            faults.append(f"model.start: {fault}")
    return shape, ""


def _fresh(model: Model, vocabulary: Vocabulary | None, faults: list[str]) -> Shape | None:
    size = {"vocab_size": vocabulary.size} if vocabulary else {}
    try:
        refuse_unknown_keys(model.config)
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
    needed = dict.fromkeys([*(role for kind in KINDS.values() for role in kind.special_tokens), "pad"])
    missing = [f"[{role.upper()}]" for role in needed if getattr(vocabulary, role) is None]
    if missing:
        faults.append(f"{name}: the tokenizer has no {' and no '.join(missing)}; training and validation need them")
    return vocabulary


def _differs(model: Model, vocabulary: Vocabulary) -> bool:
    try:
        return load_vocabulary(model.start, model.download).sha256 != vocabulary.sha256
    except DetourError:
        return False
