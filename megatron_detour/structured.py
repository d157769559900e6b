"""Strict reading of JSON and YAML: UTF-8, no duplicate keys, errors in one sentence that names the place."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from megatron_detour.errors import DetourError


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file. Raises DetourError, or FileNotFoundError, as the caller knows the remedy."""
    return parse_json(_text(path, "JSON"), str(path))


def read_yaml(path: str | Path) -> Any:
    """Return the content of a YAML file. Raises DetourError, or FileNotFoundError, as the caller knows the remedy."""
    return parse_yaml(_text(path, "YAML"), str(path))


def read_facts(path: str | Path) -> Any:
    """Like read_yaml, for files in which the key `license` may have its former spelling, `licence`."""

    def renamed(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        former = "licence" if "license" not in value and not isinstance(value.get("licence"), dict) else None
        return {"license" if key == former else key: renamed(item) for key, item in value.items()}

    return renamed(read_yaml(path))


def read_json_object(path: str | Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises DetourError for any other content, or FileNotFoundError."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise DetourError(f"{path}: not a JSON object")
    return content


def parse_json(text: str, origin: str) -> Any:
    """Parse JSON. Raises DetourError if it is invalid, has a duplicate key in an object, or is nested too deeply."""
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _unique_keys(pairs, origin))
    except json.JSONDecodeError as error:
        raise DetourError(f"{origin}: invalid JSON: {error}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
        raise DetourError(f"{origin}: invalid JSON: {_cause(error)}") from None


def parse_yaml(text: str, origin: str) -> Any:
    """Parse YAML. Raises DetourError if it is invalid, has a duplicate key in a mapping, or is nested too deeply."""
    try:
        return yaml.load(text, _UniqueKeyLoader)
    except _DuplicateKeyError as error:
        raise DetourError(f"{origin}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DetourError(f"{origin}: invalid YAML: {_cause(error)}") from None


class _DuplicateKeyError(Exception):
    pass


class _UniqueKeyLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        first: dict[Any, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key, line = self.construct_object(key_node), key_node.start_mark.line + 1
            if key in first:
                raise _DuplicateKeyError(f"line {line}: duplicate key {key!r}, first on line {first[key]}")
            first[key] = line
        return super().construct_mapping(node, deep)


def _unique_keys(pairs: list[tuple[str, Any]], origin: str) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise DetourError(f"{origin}: duplicate key {counts.most_common(1)[0][0]!r}")
    return mapping


def _text(path: str | Path, kind: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except UnicodeDecodeError as error:
        raise DetourError(f"{path}: invalid {kind}: not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise DetourError(f"{path}: cannot be read: {error.strerror}") from None


def _cause(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
