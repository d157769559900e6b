"""Conversion of plain mappings to instances and back; all faults are reported at once, each with its key."""

from __future__ import annotations

import dataclasses
import math
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import MISSING
from pathlib import Path
from typing import Any, TypeVar

from megatron_detour.errors import DetourError, format_faults, nearest
from megatron_detour.settings.fields import (
    Choice,
    Enclosing,
    FaultElsewhere,
    Parsed,
    Setting,
    Tagged,
    join_key,
    settings_of,
)

LARGEST_INTEGER = 2**53  # floating-point numbers are exact up to it
T = TypeVar("T")
SHOWN = 200  # characters of an invalid value


class Faults:
    """Messages about keys. `unusable` are keys that have one: consequences of their values are not reported.

    `shown` is how a dotted key is shown to the user.
    """

    def __init__(self, shown: Callable[[str], str] = str) -> None:
        self.shown = shown
        self.unusable: list[str] = []
        self.messages: list[str] = []

    def unreadable(self, key: str, text: str) -> None:
        """Report a key whose value is missing or invalid by itself."""
        self.unusable.append(key)
        self.messages.append(f"{self.shown(key)}: {text}" if key else text)

    def add(self, key: str, text: str, also: Iterable[str] = ()) -> None:
        """Report a fault of a key with a readable value. `also` are other keys that the fault depends on."""
        if not any(_related(a, b) for a in (key, *also) for b in self.unusable):
            self.messages.append(f"{self.shown(key)}: {text}" if key else text)

    def raise_if_any(self, origin: str) -> None:
        if self.messages:
            raise DetourError(f"{origin}: " * bool(origin) + format_faults(self.messages))


def _related(a: str, b: str) -> bool:
    return a == b or not b or a.startswith(f"{b}.") or b.startswith(f"{a}.")


def read(
    cls: type[T],
    raw: Any,
    origin: str,
    check: Callable[[T, Faults], None] | None = None,
    shown: Callable[[str], str] = str,
) -> T:
    """Build a settings dataclass from plain mappings; `check` adds faults that involve several fields.

    Raises DetourError with all faults, each with its dotted key and the value that stands there.
    """
    faults = Faults(shown)
    instance = Reader(faults).build(cls, raw, "")
    if check:
        check(instance, faults)
    faults.raise_if_any(origin)
    return instance


class Reader:
    """Invalid values are reported and replaced by valid ones of their type, so that the rest can be checked."""

    def __init__(self, faults: Faults) -> None:
        self.faults = faults
        self.enclosing: Enclosing = []

    def build(self, cls: type, raw: Any, key: str) -> Any:
        own = settings_of(cls)
        names = [setting.name for setting in own]
        if not isinstance(raw, dict):
            self.faults.unreadable(key, f"must be a mapping with {', '.join(names)}, not {_shown(raw)}")
            return _stand_in(cls)
        self.enclosing.append((cls, raw))
        values = {}
        for setting in own:
            inner, tagged = join_key(key, setting.name), setting.mark(Tagged)
            names += tagged.owners() if tagged else ()
            if tagged and (setting.name in raw or setting.default is not MISSING):
                values[setting.field] = self._tagged(setting, inner)
            elif setting.name in raw:
                values[setting.field] = self.value(setting, raw[setting.name], inner)
            elif setting.default is MISSING:
                self.faults.unreadable(inner, "this key is required")
                values[setting.field] = _stand_in_value(setting)
        self.enclosing.pop()
        for name in raw:
            if name not in names:
                hint = nearest(str(name), names) or f"; known keys: {', '.join(names)}"
                self.faults.add(join_key(key, name), f"unknown key{hint}")
        return cls(**values)

    def _tagged(self, setting: Setting, key: str) -> Any:
        tagged, raw, around = setting.mark(Tagged), self.enclosing[-1][1], key.rpartition(".")[0]
        kind = raw[setting.name] if setting.name in raw else tagged.name_of(setting.default)
        if not isinstance(kind, str) or kind not in tagged.kinds:
            hint = nearest(str(kind), tagged.kinds)
            self.faults.unreadable(key, f"must be one of {', '.join(tagged.kinds)}, not {_shown(kind)}{hint}")
            return _stand_in_value(setting)
        owners = tagged.owners()
        for name in raw.keys() & owners.keys():
            if kind not in owners[name] and raw[name] not in (None, False):  # which have no effect
                others = " or ".join(owners[name])
                self.faults.add(join_key(around, name), f"a key of {others}; with {setting.name}: {kind} remove it")
        mine = {name: raw[name] for name in raw if kind in owners.get(name, ())}
        return self.build(tagged.kinds[kind], mine, around)

    def value(self, setting: Setting, raw: Any, key: str) -> Any:
        if raw is None and setting.optional:
            return None
        if dataclasses.is_dataclass(setting.kind):
            return self.build(setting.kind, raw, key)
        faults = len(self.faults.messages)
        try:
            value = self._converted(setting, raw, key)
            for rule in setting.rules if len(self.faults.messages) == faults else ():  # else some items are stand-ins
                if must := rule.fault(value):
                    raise ValueError(must)
            return value
        except FaultElsewhere:
            self.faults.unusable.append(key)
        except ValueError as error:
            known = setting.mark(Choice) or getattr(setting.mark(Parsed), "examples", ())
            hint = nearest(raw, known) if isinstance(raw, str) else ""
            self.faults.unreadable(key, f"must be {error}, not {_shown(raw)}{hint}")
        return _stand_in_value(setting)

    def _converted(self, setting: Setting, raw: Any, key: str) -> Any:
        if parsed := setting.mark(Parsed):
            return parsed.parse(raw, self.enclosing)
        if setting.kind is tuple:
            if not isinstance(raw, list | tuple) or (not setting.ellipsis and len(raw) != len(setting.items)):
                raise ValueError("a list" if setting.ellipsis else f"a list of {len(setting.items)} values")
            items = setting.items * len(raw) if setting.ellipsis else setting.items
            return tuple(
                self.value(item, each, f"{key}.{i}") for i, (item, each) in enumerate(zip(items, raw, strict=True))
            )
        if setting.kind is dict:
            if not isinstance(raw, dict):
                raise ValueError("a mapping")
            return {name: self.value(setting.items[0], each, join_key(key, name)) for name, each in raw.items()}
        return raw if setting.kind is Any else _scalar(setting.kind, raw)


def _scalar(kind: type, raw: Any) -> Any:
    """Convert a value. Raises ValueError with what the value must be."""
    if kind is float and not isinstance(raw, bool):
        try:  # YAML 1.1 reads 2e-4 as a string
            number = float(raw)
        except (TypeError, ValueError, OverflowError):
            raise ValueError("a number") from None
        if not math.isfinite(number):
            raise ValueError("a finite number")
        return number
    if kind is Path and isinstance(raw, str | Path) and str(raw):
        return Path(raw)
    if type(raw) is not kind:
        raise ValueError(
            {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path"}[kind]
        )
    if kind is int and abs(raw) > LARGEST_INTEGER:
        raise ValueError(f"an integer up to {LARGEST_INTEGER:,}")
    if kind is str and not raw.strip():
        raise ValueError("non-empty text")
    if kind is str and has_controls(raw):
        raise ValueError("one line of text without control characters")
    return raw


def has_controls(text: str) -> bool:
    """Return whether text has line breaks, control characters, bidirectional marks or lone surrogates."""
    return any(unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") for character in text)


def _shown(raw: Any) -> str:
    text = repr(raw)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."


def _stand_in(cls: type) -> Any:
    return cls(**{s.field: _stand_in_value(s) for s in settings_of(cls) if s.default is MISSING})


def _stand_in_value(setting: Setting) -> Any:
    """Return a valid value of a type, to replace an invalid one."""
    if setting.default is not MISSING:
        return setting.default
    if setting.optional:
        return None
    if tagged := setting.mark(Tagged):
        return _stand_in(next(iter(tagged.kinds.values())))
    if choice := setting.mark(Choice):
        return choice[0]
    if dataclasses.is_dataclass(setting.kind):
        return _stand_in(setting.kind)
    return {float: 0.5, int: 1, tuple: (), dict: {}}.get(setting.kind, "")


def to_plain(value: Any) -> Any:
    """Return the mappings and lists that `read` converts to an equal value."""
    if dataclasses.is_dataclass(value):
        plain: dict[str, Any] = {}
        for setting in settings_of(type(value)):
            inner, tagged = getattr(value, setting.field), setting.mark(Tagged)
            plain |= {setting.name: tagged.name_of(inner)} if tagged else {}
            plain |= to_plain(inner) if tagged else {setting.name: to_plain(inner)}
        return plain
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
