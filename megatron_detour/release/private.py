"""Search of a release's JSON files for private values: paths, hosts, users and secrets."""

from __future__ import annotations

import getpass
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_detour.errors import DetourError
from megatron_detour.structured import read_json

_SECRET_KEY = re.compile(r"password|passwd|secret|api_?key|access_?key|credential|auth_?token|private_?key", re.I)
_SECRET = re.compile(
    r"\bhf_\w{16,}|\bgh[pousr]_\w{20,}|\bsk-[\w-]{16,}|\bAKIA[0-9A-Z]{16}|-----BEGIN|\beyJ[\w-]{8,}\.eyJ|\bxox[abprs]-"
)
_KINDS = {
    "a path": re.compile(
        r"^(~|file:|[A-Za-z]:)?[\\/][\w.-]+[\\/]\S*$|^~[\\/]|[\\/](home|Users|root|mnt|scratch)[\\/]\w"
    ),
    "an address": re.compile(r"^\w+://|\bhttps?://|[\w.+-]+@[\w-]+\.\w"),
}
# Keys of text that a tokenizer matches or inserts, which may look like anything.
_TEXT_KEYS = {"Regex", "String", "content", "additional_special_tokens", "extra_special_tokens"}
_IDENTIFIER = re.compile(r"[\w-]+")  # a value such as "default" or "bert" is a setting, even if a user has this name
_COMMON_USERS = {"root", "user", "admin", "ubuntu", "runner", "model", "mask", "token"}
SHORTEST_NAME = 4  # of a user or host; shorter names occur within words


def refuse_private(folder: Path) -> None:
    """Raise DetourError if a JSON file of `folder` contains a private value, naming its place but not the value.

    The vocabulary of tokenizer.json is ordinary text and not searched.
    """
    names = _local_names()
    for path in sorted(folder.glob("*.json")):
        content = read_json(path)
        if path.name == "tokenizer.json" and isinstance(content, dict):
            content = {key: value for key, value in content.items() if key != "model"}
        for place, key, text in _texts(content, ""):
            kind = _kind(key, text, names)
            if kind:
                raise DetourError(
                    f"{path.name}: {place} contains {kind}, which must not be released; remove it from the start "
                    "model's or the tokenizer's file and from a copy of the checkpoint"
                )


def _kind(key: str, text: str, names: dict[str, re.Pattern[str]]) -> str | None:
    if text and (_SECRET_KEY.search(key) or _SECRET.search(text)):
        return "a secret"
    if key in _TEXT_KEYS or _IDENTIFIER.fullmatch(text):
        return None
    return next((kind for kind, pattern in (_KINDS | names).items() if pattern.search(text)), None)


def _texts(value: Any, place: str, key: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield the place, key and text of each string in a JSON value, including the keys themselves."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield place or "the top level", "", name
            yield from _texts(inner, f"{place}.{name}" if place else name, name)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _texts(inner, f"{place}[{number}]", key)
    elif isinstance(value, str):
        yield place, key, value


def _local_names() -> dict[str, re.Pattern[str]]:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container without a user name
        user = ""
    names = {"the name of this host": socket.gethostname(), "the name of a user": user}
    return {
        kind: re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])")
        for kind, name in names.items()
        if len(name) >= SHORTEST_NAME and name not in _COMMON_USERS | {"localhost"}
    }
