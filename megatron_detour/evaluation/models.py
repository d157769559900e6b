"""The models of an evaluation: named folders, checked, and identified by their content."""

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

OPTIMIZER = "optimizer.safetensors"  # in a checkpoint, beside the weights


def named_models(given: list[str]) -> dict[str, Path]:
    """Return folders by name (NAME=DIR, or the folder's name). Raises DetourError for duplicate names."""
    models: dict[str, Path] = {}
    for word in given:
        name, equals, folder = word.partition("=")
        if not equals or "/" in name or (Path(word).is_dir() and not Path(folder).is_dir()):
            name, folder = Path(word).resolve().name, word
            if equals and not Path(word).is_dir():
                raise DetourError(
                    f"--model {_plain(word)}: no such folder; if the path contains '=', give NAME={_plain(word)}"
                )
        if not name or "/" in name or name.startswith(".") or not name.isprintable():
            raise DetourError(f"--model {_plain(word)}: invalid name; give NAME=DIR with a valid folder name")
        if name in models:
            raise DetourError(f"--model {word}: a second model named {name!r}; give NAME=DIR to distinguish them")
        models[name] = Path(folder)
    return models


def _plain(word: str) -> str:
    return word if word.isprintable() else repr(word)


def check_model(folder: Path, flag: str = "--model") -> None:
    """Raise DetourError, which names the flag if any, unless the folder is a Hugging Face model with a tokenizer."""
    named = f"{flag} {folder}".lstrip()
    if not folder.is_dir():
        raise DetourError(f"{named}: no such folder")
    if (folder / "checkpoints").is_dir():
        raise DetourError(f"{named}: a run directory; give one of its checkpoints, NAME={folder}/checkpoints/step-N")
    if not (folder / "config.json").is_file():
        raise DetourError(f"{named}: no config.json; give the folder of a Hugging Face model")
    if "decoder" in _model_type(folder, named):
        raise DetourError(
            f"{named}: a decoder, which only attends to the left; export the checkpoint without --decoder"
        )
    if not weight_files(folder):
        raise DetourError(f"{named}: no *.safetensors; give a folder with safetensors weights")
    if not (folder / "tokenizer.json").is_file():
        raise DetourError(f"{named}: no tokenizer.json; save the model's fast tokenizer into the folder")


def _model_type(folder: Path, named: str) -> str:
    """Read the model's JSON files, so that invalid JSON or duplicate keys are reported before training."""
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"):
        if (folder / name).is_file():
            read_json_object(folder / name)
    model_type = read_json_object(folder / "config.json").get("model_type")
    if not isinstance(model_type, str):
        raise DetourError(f"{named}: config.json is not a model's: model_type is {model_type!r}")
    return model_type


@contextmanager
def opening(folder: Path) -> Iterator[None]:
    """Turn any exception that a library raises while reading a model's folder into a DetourError."""
    try:
        yield
    except DetourError:
        raise
    except Exception as error:
        raise DetourError(f"{folder}: cannot load the model ({brief(error)})") from None


def most_positions(network: Any, tokenizer: Any) -> int:
    """Return the longest input of a model in tokens.

    RoBERTa-like models number positions after the padding index: 514 positions hold 512 tokens. Raises DetourError.
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
    """Return one hash of model_identity, as stored in results."""
    return hashlib.sha256(repr(model_identity(folder)).encode()).hexdigest()


def model_identity(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file that determines what a model computes, by file name."""
    named = [folder / name for name in ("config.json", "tokenizer.json", "tokenizer_config.json")]
    files = [*named, *weight_files(folder)]
    return {path.name: file_facts(path)["sha256"] for path in files if path.is_file()}
