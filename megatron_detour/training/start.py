"""What a run starts from: the configuration, and where weights and tokenizer come from, checked against each other."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_detour.checkpoint.huggingface import TOKENIZER_FILES, Source, fresh_config
from megatron_detour.config import Model, RunConfig
from megatron_detour.data.vocabulary import Vocabulary, find_tokenizer, load_vocabulary
from megatron_detour.data.words import Words
from megatron_detour.errors import DetourError
from megatron_detour.model.shape import Shape


@dataclass(frozen=True)
class StartModel:
    config: dict[str, Any]  # config.json
    shape: Shape
    weights: Source | None  # None: initialised from the seed
    tokenizer: Source
    tokenizer_file: Path
    vocabulary: Vocabulary
    words: Words | None  # None: no phase masks whole words

    @classmethod
    def of(cls, config: RunConfig) -> StartModel:
        """Raises DetourError for a model that is no ModernBERT, or that does not fit tokenizer or run file."""
        model = config.model
        weights = Source(model.start, model.download) if model.start else None
        described = weights.config() if weights else None
        if described is not None:
            Shape.of(described, model.start)  # before the tokenizer: the model's own fault is the one to tell
        vocabulary = _vocabulary(model, weights)
        described = described or fresh_config(model.config, vocabulary)
        shape = Shape.of(described, model.start or "model.config")
        _check_fit(config, vocabulary, shape)
        tokenizer = _tokenizer(model)
        file = find_tokenizer(tokenizer.name, tokenizer.download)
        words = _words(config, vocabulary, file)
        return cls(described, shape, weights, _fetched(tokenizer), file, vocabulary, words)


def _tokenizer(model: Model) -> Source:
    return Source(model.tokenizer or model.start, model.download)


def _vocabulary(model: Model, weights: Source | None) -> Vocabulary:
    source = _tokenizer(model)
    vocabulary = load_vocabulary(source.name, source.download)
    if vocabulary.mask is None or vocabulary.pad is None:
        raise DetourError(f"{source.name}: the tokenizer has no [MASK] or no [PAD]; masked training needs both")
    if model.tokenizer and weights and weights.has("tokenizer.json"):
        own = load_vocabulary(weights.name, weights.download)
        if own.sha256 != vocabulary.sha256:
            raise DetourError(
                f"model.tokenizer: {model.tokenizer} is not the tokenizer that {model.start} was trained with; remove "
                "the key to use the model's own"
            )
    return vocabulary


def _words(config: RunConfig, vocabulary: Vocabulary, tokenizer_file: Path) -> Words | None:
    if not any(phase.whole_word_masking for phase in config.phases):
        return None
    return Words.of(tokenizer_file, vocabulary)


def _check_fit(config: RunConfig, vocabulary: Vocabulary, shape: Shape) -> None:
    name = _tokenizer(config.model).name
    if vocabulary.size > shape.vocabulary:
        raise DetourError(
            f"{name}: the tokenizer has {vocabulary.size:,} ids, the model's embedding only {shape.vocabulary:,}; "
            "they do not belong together"
        )
    lengths = {"data.sequence_length": config.data.sequence_length}
    lengths |= {f"phases.{p.name}.sequence_length": p.sequence_length for p in config.phases if p.sequence_length}
    for key, length in lengths.items():
        if length > shape.max_positions:
            raise DetourError(f"{key}: {length:,} is more than the model's {shape.max_positions:,} positions")
    shape.check_tensor_parallel(config.parallel.tensor)


def _fetched(tokenizer: Source) -> Source:
    """The same tokenizer with its small files fetched: checkpoints copy them from the local cache."""
    if not Path(tokenizer.name).exists():
        for name in TOKENIZER_FILES:
            tokenizer.has(name)
    return dataclasses.replace(tokenizer, download=False)
