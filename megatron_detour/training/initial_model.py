"""The model that a run starts from: its configuration, and the sources of weights and tokenizer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_detour.checkpoint.huggingface import TOKENIZER_FILES, fresh_config, special_ids
from megatron_detour.checkpoint.source import Source, adjusted_config
from megatron_detour.model.families import Family, read_shape
from megatron_detour.preflight import Preflight
from megatron_detour.tokenizer.vocabulary import find_tokenizer


@dataclass(frozen=True)
class InitialModel:
    config: dict[str, Any]  # config.json, with the vocabulary of the run's tokenizer
    shape: Family
    weights: Source | None  # None: initialized from the seed
    tokenizer: Source
    tokenizer_file: Path
    checked: Preflight  # without faults: vocabulary, word boundaries and the DeepSpeed file

    @classmethod
    def from_preflight(cls, checked: Preflight) -> InitialModel:
        """Raise DetourError with all faults of the preflight check."""
        model = checked.refuse().model
        weights = Source(model.start, model.download) if model.start else None
        config = adjusted_config(weights, model.config) if weights else fresh_config(model.config, checked.vocabulary)
        ids = special_ids(checked.vocabulary)  # which a FlexBERT training file leaves open
        config |= {key: ids.get(key) for key, value in config.items() if key in ids and value is None}
        config |= {"vocab_size": checked.shape.vocabulary}
        shape = read_shape(config, model.start or "model.config")
        tokenizer = Source(model.tokenizer or model.start, model.download)
        file = find_tokenizer(tokenizer.name, tokenizer.download)
        return cls(config, shape, weights, _fetched(tokenizer), file, checked)

    @property
    def entities(self) -> dict[str, str]:
        """The SHA-256 of each file of words that objectives mask first."""
        words = self.checked.words
        return {file: entities.sha256 for file, entities in words.entities.items()} if words else {}

    def changed(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        """Return a parameter of the start model, with rows for more positions and for the pieces that are added.

        A new row of the embedding and of the output layer is the mean of the rows of the piece's old ids.
        """
        if not self.checked.new_rows or name not in self.shape.by_vocabulary:
            return self.shape.fitted(name, stored)
        full = torch.cat([stored, stored.new_zeros(self.shape.vocabulary - len(stored), *stored.shape[1:])])
        for row, ids in self.checked.new_rows.items():
            full[row] = stored[ids].mean(0)
        return full


def _fetched(tokenizer: Source) -> Source:
    """Fetch the tokenizer's small files, which checkpoints copy from the local cache."""
    if not Path(tokenizer.name).exists():
        for name in TOKENIZER_FILES:
            tokenizer.has(name)
    return dataclasses.replace(tokenizer, download=False)
