"""Typed access to a config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from megatron_detour.errors import DetourError

MAX_SIZE = 10**7  # larger values are typos and would exhaust memory


@dataclass(frozen=True)
class ConfigJson:
    """Every method raises DetourError for a missing key or an invalid value."""

    config: dict[str, Any]
    origin: str

    def size(self, key: str, default: int | None = None, least: int = 1, most: int = MAX_SIZE) -> int:
        value = self.config.get(key, default)
        if type(value) is not int or not least <= value <= most:
            self.refuse(key, f"an integer from {least} to {most:,}")
        return value

    def number(self, key: str, default: float) -> float:
        return self.positive(key, self.config.get(key, default))

    def flag(self, key: str, default: bool) -> bool:
        value = self.config.get(key, default)
        if type(value) is not bool:
            self.refuse(key, "true or false")
        return value

    def choice(self, key: str, possible: tuple[str, ...], default: str) -> str:
        value = self.config.get(key, default)
        if value not in possible:
            self.refuse(key, f"one of {', '.join(possible)}")
        return value

    def positive(self, key: str, value: Any) -> float:
        if type(value) not in (int, float) or not 0 < value < 1e30:
            self.refuse(key, "a number above 0", value)
        return float(value)

    def mapping(self, key: str, inside: dict[str, Any], name: str = "") -> dict[str, Any]:
        """Return the mapping at `key`, {} for null; `name` is the key in messages."""
        value = inside.get(key)
        if value is not None and not isinstance(value, dict):
            self.refuse(name or key, "a mapping", value)
        return value or {}

    def refuse(self, key: str, needed: str, value: Any = None) -> None:
        if value is None and key not in self.config:
            raise DetourError(f"{self.origin}: missing key {key}; it must be {needed}")
        shown = json.dumps(self.config.get(key) if value is None else value, default=str)
        raise DetourError(f"{self.origin}: {key} must be {needed}, not {shown[:60]}")
