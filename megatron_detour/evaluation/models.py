"""Models as they are given to an evaluation: folders with names, checked and identified by their content."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from megatron_detour.errors import DetourError
from megatron_detour.files import file_facts

OPTIMIZER = "optimizer.safetensors"  # of a checkpoint, beside its weights


def named_models(given: list[str]) -> dict[str, Path]:
    """Folders by name: NAME=DIR, else the folder's own. Raises DetourError where two have the same."""
    models: dict[str, Path] = {}
    for word in given:
        name, equals, folder = word.partition("=")
        path = Path(folder if equals else word)
        name = name if equals else path.resolve().name
        if not name or "/" in name or name.startswith("."):
            raise DetourError(f"--model {word}: give NAME=DIR with a name that can be a folder's")
        if name in models:
            raise DetourError(f"--model {word}: a second model named {name!r}; give NAME=DIR to tell them apart")
        models[name] = path
    return models


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
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return str(config.get("model_type"))
    except (ValueError, AttributeError):
        raise DetourError(f"--model {folder}: its config.json is not that of a model") from None


def weight_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.safetensors")) if path.name != OPTIMIZER]


def fingerprint(folder: Path) -> str:
    """identity_of in one word, as results hold it."""
    return hashlib.sha256(repr(identity_of(folder)).encode()).hexdigest()


def identity_of(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that decide on what a model computes, by their names."""
    named = [folder / name for name in ("config.json", "tokenizer.json", "tokenizer_config.json")]
    files = [*named, *weight_files(folder)]
    return {path.name: file_facts(path)["sha256"] for path in files if path.is_file()}
