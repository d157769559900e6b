"""Settings as frozen dataclasses: a field's annotation holds its rules and one line of help, and all else follows.

    clip: Annotated[float, Range(above=0), "largest gradient norm"] = 1.0

`read` builds an instance from plain mappings (YAML, JSON) and reports all faults at once. `add_arguments`,
`from_namespace` and `validate` make the fields flags of a command. `json_schema` and `markdown_table` describe them.
A field is an int, float, bool, str, Path, dict, tuple, another such dataclass, or one of these or None.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import types
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

from megatron_detour.errors import DetourError, format_faults, nearest
from megatron_detour.structured import parse_yaml

LARGEST_INTEGER = 2**53  # beyond it floating-point numbers skip integers
T = TypeVar("T")
SHOWN = 200  # characters of a wrong value
Enclosing = list[tuple[type, dict[str, Any]]]  # the mappings around a value and the classes they are read as


class Rule(Protocol):
    """What a value must be. `fault` completes "must be ..." where a value is not, `schema` says it in JSON Schema."""

    def fault(self, value: Any) -> str | None: ...

    def schema(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Range:
    """Bounds of a number."""

    above: float | None = None
    least: float | None = None
    below: float | None = None
    most: float | None = None

    def fault(self, value: float) -> str | None:
        above = (self.above is None or value > self.above) and (self.least is None or value >= self.least)
        below = (self.below is None or value < self.below) and (self.most is None or value <= self.most)
        return None if above and below else str(self)

    def __str__(self) -> str:
        bounds = {"above": self.above, "at least": self.least, "below": self.below, "at most": self.most}
        return " and ".join(f"{word} {bound:,}" for word, bound in bounds.items() if bound is not None)

    def schema(self) -> dict[str, Any]:
        bounds = {"exclusiveMinimum": self.above, "minimum": self.least}
        bounds |= {"exclusiveMaximum": self.below, "maximum": self.most}
        return {name: bound for name, bound in bounds.items() if bound is not None}


@dataclass(frozen=True)
class Entries:
    """A list with at least so many entries, all different if `unique`."""

    least: int = 0
    unique: bool = False

    def fault(self, value: tuple) -> str | None:
        if len(value) < self.least:
            return f"a list with at least {self.least} entr{'y' if self.least == 1 else 'ies'}"
        return "a list without repetitions" if self.unique and len(set(value)) < len(value) else None

    def schema(self) -> dict[str, Any]:
        return {"minItems": self.least, "uniqueItems": self.unique}


class Choice(tuple):
    """One of these names."""

    def fault(self, value: Any) -> str | None:
        return None if value in self else f"one of {', '.join(self)}"

    def schema(self) -> dict[str, Any]:
        return {"enum": list(self)}


@dataclass(frozen=True)
class Pattern:
    """A text that this regular expression matches as a whole; `what` says so in words."""

    expression: str
    what: str

    def fault(self, value: str) -> str | None:
        return None if re.fullmatch(self.expression, value) else self.what

    def schema(self) -> dict[str, Any]:
        return {"pattern": f"^(?:{self.expression})$"}


@dataclass(frozen=True, eq=False)  # hashed by identity, as annotations are
class Parsed:
    """How a value is written that is not plain, such as an amount with a unit.

    `parse` takes the raw value and the mappings around it, outermost first; it raises ValueError with what the value
    must be, or FaultElsewhere.
    """

    parse: Callable[[Any, Enclosing], Any]
    written: dict[str, Any]  # JSON Schema
    examples: tuple[str, ...] = ()  # what may have been meant

    def schema(self) -> dict[str, Any]:
        return self.written


class FaultElsewhere(ValueError):
    """A value cannot be read because of another key, which has a fault of its own."""


@dataclass(frozen=True, eq=False)  # hashed by identity, as annotations are
class Tagged:
    """A field that is one of several dataclasses: its key names the kind, whose own keys stand beside it.

    `objective: Annotated[Objective, Tagged({"clm": Clm, "mlm": Mlm})]` reads {objective: mlm, mask_rate: 0.15, ...}.
    """

    kinds: dict[str, type]

    def name_of(self, value: Any) -> str:
        return next(name for name, cls in self.kinds.items() if cls is type(value))

    def keys(self) -> dict[str, list[str]]:
        """The keys of all kinds, each with the kinds that have it."""
        owners: dict[str, list[str]] = {}
        for kind, cls in self.kinds.items():
            for setting in settings_of(cls):
                owners.setdefault(setting.name, []).append(kind)
        return owners


@dataclass(frozen=True)
class Flag:
    """How a field is shown in --help, beside what follows from its type."""

    metavar: str | None = None
    group: str | None = None
    aliases: tuple[str, ...] = ()


def _any_text(raw: Any, _: Enclosing) -> str:
    if not isinstance(raw, str):
        raise ValueError("text")
    return raw


AnyText = Annotated[str, Parsed(_any_text, {"type": "string"})]  # may be empty or have several lines


class Setting(NamedTuple):
    """A field, its annotation taken apart. Of a tuple or dict, `items` are what it consists of."""

    name: str
    kind: Any
    items: tuple[Setting, ...]
    ellipsis: bool  # of a tuple: any number of its item
    optional: bool
    marks: tuple[Any, ...]
    default: Any  # MISSING: the key is required

    def mark(self, kind: type) -> Any:
        return next((mark for mark in self.marks if isinstance(mark, kind)), None)

    @property
    def help(self) -> str:
        return self.mark(str) or ""

    @property
    def rules(self) -> list[Rule]:
        return [mark for mark in self.marks if hasattr(mark, "fault")]


@cache
def settings_of(cls: type) -> tuple[Setting, ...]:
    """The fields of a settings dataclass, in order."""
    hints = get_type_hints(cls, include_extras=True)
    return tuple(_setting(field.name, hints[field.name], _default(field)) for field in dataclasses.fields(cls))


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _setting(name: str, hint: Any, default: Any = MISSING) -> Setting:
    marks: tuple[Any, ...] = ()
    optional = False
    while get_origin(hint) in (Annotated, Union, types.UnionType):
        if get_origin(hint) is Annotated:
            marks, hint = (*hint.__metadata__, *marks), hint.__origin__
        else:  # X | None
            optional, hint = True, get_args(hint)[0]
    arguments = get_args(hint)
    ellipsis = Ellipsis in arguments
    kind = get_origin(hint) or hint
    chosen = arguments[:1] if ellipsis else arguments[1:] if kind is dict else arguments
    items = tuple(_setting("", argument) for argument in chosen)
    return Setting(name, kind, items, ellipsis, optional, marks, default)


class Faults:
    """Sentences about keys. `unusable` are keys that already have one: what follows from their values is not reported.

    `shown` is how a dotted key is shown to the user.
    """

    def __init__(self, shown: Callable[[str], str] = str) -> None:
        self.shown = shown
        self.unusable: list[str] = []
        self.messages: list[str] = []

    def unreadable(self, key: str, text: str) -> None:
        """Reports a key whose value is missing or breaks a rule of its own."""
        self.unusable.append(key)
        self.messages.append(f"{self.shown(key)}: {text}" if key else text)

    def add(self, key: str, text: str, also: Iterable[str] = ()) -> None:
        """Reports a fault of a key with a readable value. `also` are the other keys that the fault follows from."""
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
    """Builds a settings dataclass from plain mappings; `check` adds the faults that no single field shows.

    Raises DetourError with all faults, each with its dotted key and the value that stands there.
    """
    faults = Faults(shown)
    instance = _Reader(faults).build(cls, raw, "")
    if check:
        check(instance, faults)
    faults.raise_if_any(origin)
    return instance


class _Reader:
    """Values that break a rule are reported and replaced by others of their type, so that the rest can be checked."""

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
            names += [name for name in (tagged.keys() if tagged else ()) if name not in names]
            if tagged and (setting.name in raw or setting.default is not MISSING):
                values[setting.name] = self._tagged(setting, inner)
            elif setting.name in raw:
                values[setting.name] = self.value(setting, raw[setting.name], inner)
            elif setting.default is MISSING:
                self.faults.unreadable(inner, "this key is required")
                values[setting.name] = _stand_in_value(setting)
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
        owners = tagged.keys()
        for name in raw.keys() & owners.keys():
            if kind not in owners[name] and raw[name] not in (None, False):  # which say nothing
                others = " or ".join(owners[name])
                self.faults.add(join_key(around, name), f"a key of {others}; with {setting.name}: {kind} remove it")
        mine = {name: raw[name] for name in raw if kind in owners.get(name, ())}
        return self.build(tagged.kinds[kind], mine, around)

    def value(self, setting: Setting, raw: Any, key: str) -> Any:
        if raw is None and setting.optional:
            return None
        if dataclasses.is_dataclass(setting.kind):
            return self.build(setting.kind, raw, key)
        try:
            value = self._converted(setting, raw, key)
            for rule in setting.rules:
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
    """Raises ValueError with what the value must be."""
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
    """Line breaks, control characters, bidirectional marks, halves of characters."""
    return any(unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") for character in text)


def _shown(raw: Any) -> str:
    text = repr(raw)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."


def _stand_in(cls: type) -> Any:
    return cls(**{s.name: _stand_in_value(s) for s in settings_of(cls) if s.default is MISSING})


def _stand_in_value(setting: Setting) -> Any:
    """Some value of a type, in the place of one that was refused."""
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
    """Mappings and lists from which `read` makes an equal value."""
    if dataclasses.is_dataclass(value):
        plain: dict[str, Any] = {}
        for setting in settings_of(type(value)):
            inner, tagged = getattr(value, setting.name), setting.mark(Tagged)
            plain |= {setting.name: tagged.name_of(inner)} if tagged else {}
            plain |= to_plain(inner) if tagged else {setting.name: to_plain(inner)}
        return plain
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def join_key(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def apply_override(raw: dict[str, Any], override: str) -> str:
    """Sets the value of ``key=value``, a dotted key and YAML, in plain mappings. Returns the key. Raises DetourError.

    An entry of a list is named by its number, or by its `name` or `prefix`.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise DetourError(f"override {override!r}: write it as key=value, for instance phases.detour.tokens=1B")
    if has_controls(override):  # YAML would make a space of a line break
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
    raise DetourError(f"override {override!r}: {part!r} is neither a number below {len(items)} nor one of {names}")


def flag(key: str) -> str:
    """The flag of a field, or of what a dotted key begins with."""
    return "--" + key.partition(".")[0].replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser, cls: type) -> None:
    """Gives a parser a flag for each field, in groups where the annotations name some."""
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
    arguments: dict[str, Any] = {"type": value.kind}
    if setting.default is MISSING:
        arguments["required"] = True
    else:
        arguments["default"] = setting.default
        helped += f" ({_default_words(setting.default)})" if setting.default not in (None, (), "") else ""
    if setting.kind is tuple:
        arguments["nargs"] = "+"
    if choice := value.mark(Choice):
        arguments["choices"] = tuple(choice)
    elif shown.metavar or value.kind in (int, float, Path):
        arguments["metavar"] = shown.metavar or {int: "N", float: "X", Path: "FILE"}[value.kind]
    return arguments | {"help": helped}


def _default_words(default: Any) -> str:
    if isinstance(default, tuple):
        return " ".join(map(str, default))
    return repr(default)[1:-1].replace("%", "%%") if isinstance(default, str) else f"{default:,g}"


def from_namespace(cls: type[T], options: argparse.Namespace) -> T:
    """The instance that parsed flags say; `validate` checks it."""
    values = {setting.name: getattr(options, setting.name) for setting in settings_of(cls)}
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def validate(instance: T, check: Callable[[T, Faults], None] | None = None, shown: Callable[[str], str] = flag) -> None:
    """Raises DetourError with all faults of an instance that was made of flags, each with its flag."""
    read(type(instance), to_plain(instance), "", check, shown)


def json_schema(cls: type, title: str) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of the mappings that `read` takes, for editors."""
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
            keys = {name: schema for each in inner.values() for name, schema in each["properties"].items()}
            properties |= keys
            for kind, schema in inner.items():
                refused = dict.fromkeys(sorted(keys.keys() - schema["properties"].keys()), False)
                then = {"required": schema["required"], "properties": refused}
                conditions.append({"if": {"properties": {setting.name: {"const": kind}}}, "then": then})
    required = [setting.name for setting in settings_of(cls) if setting.default is MISSING]
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return schema | ({"allOf": conditions} if conditions else {})


def _value_schema(setting: Setting, definitions: dict[str, Any]) -> dict[str, Any]:
    schema: dict[str, Any] = {"description": setting.help} if setting.help else {}
    if tagged := setting.mark(Tagged):
        return schema | {"enum": list(tagged.kinds)}
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
    """A row per key, with its default and its help. A class that stands at several keys is taken apart at the first."""
    lines = [f"| {'flag' if shown is flag else 'key'} | default | |", "|---|---|---|"]
    for key, setting in _keys(cls, "", set()):
        default = "required" if setting.default is MISSING else _default_cell(setting.default)
        choices = setting.mark(Choice) or getattr(setting.mark(Tagged), "kinds", ())
        named = f": {', '.join(f'`{name}`' for name in choices)}" if choices else ""
        lines.append(f"| `{shown(key)}` | {default} | {setting.help}{named} |")
    return "\n".join(lines)


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
    if default in (None, (), {}) or dataclasses.is_dataclass(default):
        return ""
    return f"`{json.dumps(to_plain(default)) if not isinstance(default, str) or not default.strip() else default}`"
