"""Models as they are given to an evaluation: folders with names, checked and identified by their content."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_detour.errors import DetourError, brief
from megatron_detour.files import file_facts
from megatron_detour.structured import read_json_object

OPTIMIZER = "optimizer.safetensors"  # of a checkpoint, beside its weights


def named_models(given: list[str]) -> dict[str, Path]:
    """Folders by name: NAME=DIR, else the folder's own. Raises DetourError where two have the same."""
    models: dict[str, Path] = {}
    for word in given:
        name, equals, folder = word.partition("=")
        if not equals or "/" in name or (Path(word).is_dir() and not Path(folder).is_dir()):
            name, folder = Path(word).resolve().name, word
            if equals and not Path(word).is_dir():
                raise DetourError(
                    f"--model {_plain(word)}: there is no such folder; as the path holds '=', give NAME={_plain(word)}"
                )
        if not name or "/" in name or name.startswith(".") or not name.isprintable():
            raise DetourError(f"--model {_plain(word)}: give NAME=DIR with a name that can be a folder's")
        if name in models:
            raise DetourError(f"--model {word}: a second model named {name!r}; give NAME=DIR to tell them apart")
        models[name] = Path(folder)
    return models


def _plain(word: str) -> str:
    return word if word.isprintable() else repr(word)


def check_model(folder: Path) -> None:
    """Raises DetourError for a folder that is no Hugging Face model with a tokenizer."""
    if not folder.is_dir():
        raise DetourError(f"--model {folder}: there is no such folder")
    if (folder / "checkpoints").is_dir():
        raise DetourError(f"--model {folder}: this is a run; give a checkpoint of it, NAME={folder}/checkpoints/step-N")
    if not (folder / "config.json").is_file():
        raise DetourError(f"--model {folder}: no config.json there; give the folder of a Hugging Face model")
    if "decoder" in _model_type(folder):
        raise DetourError(
            f"--model {folder}: this is a decoder, which reads from left to right only; export the checkpoint without "
            "--decoder"
        )
    if not weight_files(folder):
        raise DetourError(f"--model {folder}: no *.safetensors there, so it has no weights that could be read")
    if not (folder / "tokenizer.json").is_file():
        raise DetourError(f"--model {folder}: no tokenizer.json there; save the model's fast tokenizer into the folder")


def _model_type(folder: Path) -> str:
    """Reads what decides on a model, so that invalid JSON, or a key that appears twice, is reported before training."""
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"):
        if (folder / name).is_file():
            read_json_object(folder / name)
    model_type = read_json_object(folder / "config.json").get("model_type")
    if not isinstance(model_type, str):
        raise DetourError(f"--model {folder}: its config.json is not that of a model: model_type is {model_type!r}")
    return model_type


@contextmanager
def opening(folder: Path) -> Iterator[None]:
    """Makes a DetourError of whatever a library raises over the files of a model's folder."""
    try:
        yield
    except DetourError:
        raise
    except Exception as error:
        raise DetourError(f"{folder}: cannot be opened as a model ({brief(error)})") from None


def most_positions(network: Any, tokenizer: Any) -> int:
    """How many tokens a model reads at most.

    RoBERTa and its kin number positions from the padding's on: 514 of them hold 512 tokens. Raises DetourError.
    """
    limits = [tokenizer.model_max_length, getattr(network.config, "max_position_embeddings", None) or math.inf]
    for name, module in network.named_modules():
        if name.endswith("position_embeddings") and hasattr(module, "num_embeddings"):
            padding = module.padding_idx
            limits.append(module.num_embeddings - (0 if padding is None else padding + 1))
    for limit in limits:
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit > 0:
            raise DetourError(f"{tokenizer.name_or_path}: model_max_length {limit!r} must be a positive number")
    return int(min(limits))


def weight_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.safetensors")) if path.name != OPTIMIZER and path.is_file()]


def fingerprint(folder: Path) -> str:
    """identity_of in one word, as results hold it."""
    return hashlib.sha256(repr(identity_of(folder)).encode()).hexdigest()


def identity_of(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that decide on what a model computes, by their names."""
    named = [folder / name for name in ("config.json", "tokenizer.json", "tokenizer_config.json")]
    files = [*named, *weight_files(folder)]
    return {path.name: file_facts(path)["sha256"] for path in files if path.is_file()}
