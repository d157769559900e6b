"""Read a RunConfig from YAML: apply overrides, then check single keys and combinations of keys."""

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
    """Read a run file and apply overrides such as ``phases.detour.tokens=1B``.

    Raise DetourError with all faults, each with the key to change.
    """
    path = _find(Path(path))
    try:
        raw = read_yaml(path)
    except FileNotFoundError:
        hint = nearest(path.stem, recipes())
        raise DetourError(f"{path}: no such run file or recipe{hint}") from None
    if not isinstance(raw, dict):
        raise DetourError(f"{path}: a run file is a YAML mapping with keys such as name, model, data and phases")
    for override in overrides or []:
        apply_override(raw, override)
    config = from_dict(raw, str(path))
    return dataclasses.replace(config, deepspeed=_beside(config.deepspeed, path))


def recipes() -> list[str]:
    """Return the names of the packaged run files."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _find(path: Path) -> Path:
    """Return the path, or if it does not exist the recipe called NAME or examples/recipes/NAME.yaml."""
    named = path.stem if str(path.parent) in (".", "examples/recipes") else ""
    return RECIPES / f"{named}.yaml" if named in recipes() and not path.exists() else path


def from_dict(raw: dict[str, Any], origin: str = "run file") -> RunConfig:
    """Build and check a RunConfig from plain mappings. Raise DetourError with all faults."""
    return read(RunConfig, raw, origin, check)


def _beside(file: str, run_file: Path) -> str:
    """Resolve a relative file against the current folder first, then against the run file's folder."""
    beside = run_file.parent / file
    return os.path.normpath(beside) if not Path(file).exists() and beside.exists() else file
