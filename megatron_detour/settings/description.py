"""JSON Schema and Markdown tables of settings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import MISSING
from typing import Any

from megatron_detour.settings.fields import Choice, Parsed, Setting, Tagged, join_key, settings_of
from megatron_detour.settings.flags import flag
from megatron_detour.settings.reader import to_plain


def json_schema(cls: type, title: str) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of the mappings that `read` accepts, for editors."""
    definitions: dict[str, Any] = {}
    whole = _object_schema(cls, definitions)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title, **whole, "$defs": definitions}


def _object_schema(cls: type, definitions: dict[str, Any]) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    conditions = []
    for setting in settings_of(cls):
        properties[setting.name] = _value_schema(setting, definitions)
        if tagged := setting.mark(Tagged):
            inner = {kind: _object_schema(cls, definitions) for kind, cls in tagged.kinds.items()}
            keys = tagged.owners()
            for name, kinds in keys.items():
                schemas = [inner[kind]["properties"][name] for kind in kinds]
                properties[name] = schemas[0] if all(schema == schemas[0] for schema in schemas) else {}
            for kind, schema in inner.items():
                shared = {name: each for name, each in schema["properties"].items() if not properties[name]}
                refused = dict.fromkeys(sorted(keys.keys() - schema["properties"].keys()), False)
                then = {"required": schema["required"], "properties": shared | refused}
                named = {"properties": {setting.name: {"const": kind}}}
                if setting.default is not MISSING and kind != tagged.name_of(setting.default):
                    named["required"] = [setting.name]
                conditions.append({"if": named, "then": then})
    required = [setting.name for setting in settings_of(cls) if setting.default is MISSING]
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return schema | ({"allOf": conditions} if conditions else {})


def _value_schema(setting: Setting, definitions: dict[str, Any]) -> dict[str, Any]:
    schema: dict[str, Any] = {"description": setting.help} if setting.help else {}
    if tagged := setting.mark(Tagged):
        default = {} if setting.default is MISSING else {"default": tagged.name_of(setting.default)}
        return schema | {"enum": list(tagged.kinds)} | default
    if dataclasses.is_dataclass(setting.kind):
        if setting.kind.__name__ not in definitions:
            definitions[setting.kind.__name__] = _object_schema(setting.kind, definitions)
        reference = {"$ref": f"#/$defs/{setting.kind.__name__}"}
        return schema | ({"anyOf": [reference, {"type": "null"}]} if setting.optional else reference)
    parsed = setting.mark(Parsed)
    schema |= parsed.schema() if parsed else _type_schema(setting, definitions)
    for rule in setting.rules:
        schema |= rule.schema()
    if setting.optional:
        schema["type"] = [*([schema["type"]] if isinstance(schema["type"], str) else schema["type"]), "null"]
        if "enum" in schema:
            schema["enum"] = [*schema["enum"], None]
    if setting.default not in (MISSING, None):
        schema["default"] = to_plain(setting.default)
    return schema


def _type_schema(setting: Setting, definitions: dict[str, Any]) -> dict[str, Any]:
    if setting.kind is tuple and setting.ellipsis:
        return {"type": "array", "items": _value_schema(setting.items[0], definitions)}
    if setting.kind is tuple:
        items = [_value_schema(item, definitions) for item in setting.items]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    kinds = {int: "integer", float: "number", bool: "boolean", dict: "object"}
    return {"type": kinds[setting.kind]} if setting.kind in kinds else {"type": "string", "minLength": 1}


def markdown_table(cls: type, shown: Callable[[str], str] = str) -> str:
    """Return a row per key, with default and help. A class used by several keys is expanded at the first, and a key
    that several kinds share is shown once."""
    lines = [f"| {'flag' if shown is flag else 'key'} | default | |", "|---|---|---|"]
    for key, setting in _keys(cls, "", set()):
        tagged, default = setting.mark(Tagged), setting.default
        if tagged and default is not MISSING:
            default = tagged.name_of(default)
        default = "required" if default is MISSING else _default_cell(default)
        choices = setting.mark(Choice) or (tagged.kinds if tagged else ())
        named = f": {', '.join(f'`{name}`' for name in choices)}" if choices else ""
        lines.append(f"| `{shown(key)}` | {default} | {setting.help}{named} |")
    return "\n".join(dict.fromkeys(lines))


def _keys(cls: type, key: str, done: set[type]) -> Iterator[tuple[str, Setting]]:
    done.add(cls)
    for setting in settings_of(cls):
        here = join_key(key, setting.name)
        inner = setting.items[0].kind if setting.items else setting.kind
        tagged = setting.mark(Tagged)
        nested = dataclasses.is_dataclass(inner) and inner not in done and not tagged
        if not nested or setting.help:
            yield here, setting
        if nested:
            yield from _keys(inner, f"{here}.N" if setting.kind is tuple else here, done)
        for each in tagged.kinds.values() if tagged else ():
            yield from _keys(each, key, done)


def _default_cell(default: Any) -> str:
    if default in (None, (), {}, "") or dataclasses.is_dataclass(default):
        return ""
    return f"`{json.dumps(to_plain(default)) if not isinstance(default, str) or not default.strip() else default}`"
