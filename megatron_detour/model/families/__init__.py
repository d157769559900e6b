"""Families of encoders, one per file. Every `Family` subclass in a module of this package is registered."""

from __future__ import annotations

from typing import Any

from megatron_detour.errors import DetourError
from megatron_detour.model.families.base import Family
from megatron_detour.model.families.modernbert import ModernBert
from megatron_detour.registry import registry

DECODER = "modernbert-decoder"
DEFAULT = ModernBert  # of a model.config without a model_type
FAMILIES = registry(__name__, Family, DEFAULT, "model_type")
PUBLISHED = {name: config for family in FAMILIES.values() for name, config in family.published.items()}


def family_of(config: dict[str, Any], origin: str) -> type[Family]:
    """Return the family that a config.json's model_type names. Raise DetourError for an unknown one."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise DetourError(f"{origin}: model_type {model_type!r} is not supported; known: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]


def family_to_initialize(given: dict[str, Any]) -> type[Family]:
    """Return the family of a run file's model.config. Raise DetourError for an unknown model_type."""
    return family_of({"model_type": DEFAULT.model_type} | given, "model.config")


def as_encoder(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config.json of the encoder that a ModernBertDecoder's is trained as; any other as it is.

    Its local_attention / 2 keys include the query's own, so the encoder's local layers see one fewer on either side.
    """
    if config.get("model_type") != DECODER:
        return config
    local = config.get("local_attention", 128)
    shorter = {"local_attention": local - 2} if isinstance(local, int) and local > 3 else {}
    return config | shorter | {"model_type": ModernBert.model_type}


def read_shape(config: dict[str, Any], origin: str) -> Family:
    """Read a config.json's mapping, of transformers 4 or 5. Raise DetourError for a model that is not supported."""
    return family_of(config, origin).read(config, origin)
