"""`key=value` on the command line."""

from __future__ import annotations

from typing import Any

from megatron_detour.errors import DetourError, nearest
from megatron_detour.settings.reader import has_controls
from megatron_detour.structured import parse_yaml


def apply_override(raw: dict[str, Any], override: str) -> str:
    """Set the value of ``key=value``, a dotted key and YAML, in plain mappings. Return the key. Raises DetourError.

    An entry of a list is named by its number, or by its `name` or `prefix`.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise DetourError(f"override {override!r}: write it as key=value, for instance phases.detour.tokens=1B")
    if has_controls(override):  # YAML would turn a line break into a space
        raise DetourError(f"override {override!r}: holds a line break or a control character")
    value = parse_yaml(text, f"override {override[:80]!r}")
    here: Any = raw
    *way, last = key.split(".")
    for depth, part in enumerate(way):
        if isinstance(here, list):
            here = here[_position(here, part, override)]
        else:
            if here.get(part) is None:
                here[part] = {}
            here = here[part]
        if not isinstance(here, dict | list):
            raise DetourError(f"override {override!r}: {'.'.join(way[: depth + 1])} has no keys of its own")
    here[_position(here, last, override) if isinstance(here, list) else last] = value
    return key


def _position(items: list, part: str, override: str) -> int:
    if part.isdecimal() and int(part) < len(items):
        return int(part)
    names = [str(item.get("name", item.get("prefix"))) if isinstance(item, dict) else str(item) for item in items]
    if part in names:
        return names.index(part)
    raise DetourError(f"override {override!r}: {part!r} is none of {', '.join(names)}{nearest(part, names)}")
