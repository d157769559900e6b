"""What a run starts from: the configuration, and where weights and tokenizer come from, checked against each other."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_detour.checkpoint.huggingface import TOKENIZER_FILES, fresh_config
from megatron_detour.checkpoint.source import Source
from megatron_detour.config import RunConfig
from megatron_detour.errors import DetourError, format_faults
from megatron_detour.forecast.faults import of_shape
from megatron_detour.forecast.start import look
from megatron_detour.model.shape import Shape
from megatron_detour.plan import Plan
from megatron_detour.tokenizer.vocabulary import Vocabulary, find_tokenizer
from megatron_detour.tokenizer.word_boundaries import Words


@dataclass(frozen=True)
class InitialModel:
    config: dict[str, Any]  # config.json
    shape: Shape
    weights: Source | None  # None: initialised from the seed
    tokenizer: Source
    tokenizer_file: Path
    vocabulary: Vocabulary
    words: Words | None  # None: no phase masks whole words

    @classmethod
    def of(cls, config: RunConfig) -> InitialModel:
        """Raises DetourError with all that `plan` finds wrong with model, tokenizer and their fit to the run file."""
        model = config.model
        masks_words = config.needs_word_boundaries
        found = look(model, masks_words)
        faults = [*found.faults, *(of_shape(config, Plan.of(config), found.shape) if found.shape else ())]
        if faults:
            raise DetourError(format_faults(faults))
        weights = Source(model.start, model.download) if model.start else None
        described = weights.config() if weights else fresh_config(model.config, found.vocabulary)
        shape = Shape.of(described, model.start or "model.config")
        tokenizer = Source(model.tokenizer or model.start, model.download)
        file = find_tokenizer(tokenizer.name, tokenizer.download)
        words = Words.of(file, found.vocabulary) if masks_words else None
        return cls(described, shape, weights, _fetched(tokenizer), file, found.vocabulary, words)


def _fetched(tokenizer: Source) -> Source:
    """The same tokenizer with its small files fetched: checkpoints copy them from the local cache."""
    if not Path(tokenizer.name).exists():
        for name in TOKENIZER_FILES:
            tokenizer.has(name)
    return dataclasses.replace(tokenizer, download=False)
