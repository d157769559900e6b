"""Tiny models of one shape for the analyses: twins with other weights, written as Hugging Face folders."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_detour.tokenizer.vocabulary import load_vocabulary
from tests.models import CONFIG, tiny


def write_twin(folder: Path, tokenizer: Path, seed: int = 3, noise: float = 0.0, **changes) -> Path:
    """The tiny model of a seed, with normal noise of this size added to the weights of all layers."""
    folder.mkdir(parents=True)
    for file in tokenizer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = CONFIG | {"vocab_size": load_vocabulary(tokenizer).size} | changes
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    weights = {name: parameter.detach() for name, parameter in tiny(seed=seed, **config).named_parameters()}
    for name, weight in weights.items():
        if name.startswith("model.layers.") and noise:
            weights[name] = weight + noise * torch.randn(weight.shape, generator=generator)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
