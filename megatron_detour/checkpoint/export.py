"""A checkpoint becomes a model to release: weights, configuration and tokenizer, with the logits compared first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_detour.checkpoint import huggingface, store
from megatron_detour.checkpoint.huggingface import RUN_STATE, Source
from megatron_detour.data.vocabulary import load_vocabulary
from megatron_detour.errors import DetourError
from megatron_detour.model.shape import Shape

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Exported:
    """Which checkpoint was written, and the greatest difference of its logits to transformers', relative."""

    checkpoint: Path
    run_state: dict[str, Any]
    difference: float


def export(checkpoint: str, output: str, dtype: str) -> Exported:
    """Writes the Hugging Face folder `output`.

    Both sides compute in fp32 on the weights as written. Raises DetourError, leaving nothing, when they differ.
    """
    folder, target = _find(Path(checkpoint)), Path(output)
    if target.exists():
        raise DetourError(f"{target}: is already there; choose another --output or remove it")
    source = Source(str(folder))
    config = source.config()
    vocabulary = load_vocabulary(folder)
    shape = Shape.of(config, str(folder))
    model = huggingface.load_model(source, shape)
    rounded = {name: weight.to(DTYPES[dtype]) for name, weight in model.state_dict().items()}
    model.load_state_dict(rounded)
    difference = float("inf")

    def write(aside: Path) -> None:
        nonlocal difference
        huggingface.write_model(aside, config, source, vocabulary, rounded, DTYPES[dtype])
        difference = huggingface.compare_with_transformers(aside, model)
        huggingface.refuse_difference(difference, str(folder))

    store.publish(target, write)
    return Exported(folder, huggingface.read_run_state(folder), difference)


def _find(path: Path) -> Path:
    """A checkpoint: the folder itself, or the newest whole one of a run's folder. Raises DetourError."""
    if not path.is_dir():
        raise DetourError(f"{path}: there is no such folder")
    if (path / RUN_STATE).is_file():
        try:
            store.verify(path)
        except store.Broken as fault:
            raise DetourError(f"{path}: not a whole checkpoint: {fault}") from None
        return path
    newest = store.latest(path / "checkpoints", warn=lambda message: print(f"warning: {message}"))
    if newest is None:
        raise DetourError(f"{path}: neither a checkpoint nor a run's folder with one")
    return newest
