"""The model that a run starts from: its configuration, and the sources of weights and tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_detour.checkpoint.huggingface import TOKENIZER_FILES, fresh_config
from megatron_detour.checkpoint.source import Source
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
        config = weights.config() if weights else fresh_config(model.config, checked.vocabulary)
        config |= {"vocab_size": checked.shape.vocabulary}
        shape = read_shape(config, model.start or "model.config")
        tokenizer = Source(model.tokenizer or model.start, model.download)
        file = find_tokenizer(tokenizer.name, tokenizer.download)
        return cls(config, shape, weights, _fetched(tokenizer), file, checked)

    def with_new_rows(self, stored: Callable[[str], torch.Tensor]) -> Callable[[str], torch.Tensor]:
        """Return the start model's weights by name, with rows for the pieces that the run's tokenizer adds.

        A new row of the embedding and of the output layer's bias is the mean of the rows of the piece's old ids.
        """

        def weight(name: str) -> torch.Tensor:
            old = stored(name)
            if not self.checked.new_rows or name not in self.shape.by_vocabulary:
                return old
            full = torch.cat([old, old.new_zeros(self.shape.vocabulary - len(old), *old.shape[1:])])
            for row, ids in self.checked.new_rows.items():
                full[row] = old[ids].mean(0)
            return full

        return weight


def _fetched(tokenizer: Source) -> Source:
    """Fetch the tokenizer's small files, which checkpoints copy from the local cache."""
    if not Path(tokenizer.name).exists():
        for name in TOKENIZER_FILES:
            tokenizer.has(name)
    return dataclasses.replace(tokenizer, download=False)
