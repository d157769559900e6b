"""Fields as flags of a command."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import MISSING
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from megatron_detour.settings.fields import Choice, Entries, Flag, Setting, setting_of, settings_of
from megatron_detour.settings.reader import Faults, Reader, read, to_plain

T = TypeVar("T")


def flag(key: str) -> str:
    """Return the flag of a field, or of the first part of a dotted key."""
    return "--" + key.partition(".")[0].replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser, cls: type) -> None:
    """Add a flag for each field to a parser, in the groups that annotations name."""
    groups: dict[str | None, Any] = {None: parser}
    for setting in settings_of(cls):
        shown = setting.mark(Flag) or Flag()
        if shown.group not in groups:
            groups[shown.group] = parser.add_argument_group(shown.group)
        groups[shown.group].add_argument(flag(setting.name), *shown.aliases, **_argument(setting, shown))


def _argument(setting: Setting, shown: Flag) -> dict[str, Any]:
    helped = setting.help.replace("%", "%%")
    if setting.kind is bool:
        return {"action": "store_true", "help": helped}
    value = setting.items[0] if setting.kind is tuple else setting
    arguments: dict[str, Any] = {"type": partial(_from_text, value)}
    if setting.default is MISSING:
        arguments["required"] = True
    else:
        arguments["default"] = setting.default
        helped += f" ({_default_words(setting.default)})" if setting.default not in (None, (), "") else ""
    if setting.kind is tuple:
        entries = setting.mark(Entries)
        arguments["nargs"] = "*" if entries and not entries.least else "+"
        if setting.default == ():  # the flag may be given several times
            arguments |= {"action": "extend", "default": []}
    if choice := value.mark(Choice):
        arguments["choices"] = tuple(choice)
    elif shown.metavar or value.kind in (int, float, Path):
        arguments["metavar"] = shown.metavar or {int: "N", float: "X", Path: "FILE"}[value.kind]
    return arguments | {"help": helped}


def _from_text(setting: Setting, text: str) -> Any:
    try:
        raw = {int: int, float: float}.get(setting.kind, str)(text)
    except ValueError:
        raw = text  # which the rules of the type refuse
    faults = Faults()
    value = Reader(faults).value(setting, raw, "")
    if faults.messages:
        raise argparse.ArgumentTypeError(faults.messages[0])
    return value


def flag_type(annotation: Any) -> Callable[[str], Any]:
    """The `type` of a flag that is no field: it has the rules of an annotation."""
    return partial(_from_text, setting_of(annotation))


def _default_words(default: Any) -> str:
    if isinstance(default, tuple):
        return " ".join(map(str, default))
    if isinstance(default, str):
        return repr(default)[1:-1].replace("%", "%%")
    return f"{default:,}" if isinstance(default, int) else f"{default:,g}"


def from_namespace(cls: type[T], options: argparse.Namespace) -> T:
    """Build an instance from parsed flags; `validate` checks it."""
    values = {setting.name: getattr(options, setting.name) for setting in settings_of(cls)}
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def validate(instance: T, check: Callable[[T, Faults], None] | None = None, shown: Callable[[str], str] = flag) -> None:
    """Raise DetourError with all faults of an instance built from flags, each with its flag."""
    read(type(instance), to_plain(instance), "", check, shown)
