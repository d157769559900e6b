"""From YAML to a RunConfig: overrides, the rules of each key, and those that concern several."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from megatron_detour.config.checks import check
from megatron_detour.config.schema import RunConfig
from megatron_detour.errors import DetourError, nearest
from megatron_detour.settings import apply_override, read
from megatron_detour.structured import read_yaml

RECIPES = Path(__file__).parents[1] / "recipes"


def load(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Reads a run file and applies overrides such as ``phases.detour.tokens=1B``.

    Raises DetourError with all faults, each with the key to change.
    """
    path = _find(Path(path))
    try:
        raw = read_yaml(path)
    except FileNotFoundError:
        hint = nearest(path.stem, recipes())
        raise DetourError(f"{path}: there is no such run file, and no such recipe{hint}") from None
    if not isinstance(raw, dict):
        raise DetourError(f"{path}: a run file is a YAML mapping with keys such as name, model, data and phases")
    for override in overrides or []:
        apply_override(raw, override)
    config = from_dict(raw, str(path))
    return dataclasses.replace(config, deepspeed=_beside(config.deepspeed, path))


def recipes() -> list[str]:
    """The names of the packaged run files."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _find(path: Path) -> Path:
    """The file itself, or the recipe of its name where there is no such file, also as examples/recipes/NAME.yaml."""
    named = path.stem if str(path.parent) in (".", "examples/recipes") else ""
    return RECIPES / f"{named}.yaml" if named in recipes() and not path.exists() else path


def from_dict(raw: dict[str, Any], origin: str = "run file") -> RunConfig:
    """Builds and checks a RunConfig from plain mappings. Raises DetourError with all faults."""
    return read(RunConfig, raw, origin, check)


def _beside(file: str, run_file: Path) -> str:
    """A relative file is looked for from the current folder first, then from the run file's."""
    beside = run_file.parent / file
    return os.path.normpath(beside) if not Path(file).exists() and beside.exists() else file
