"""Fields of a settings dataclass and their annotations: rules, kinds, flags, help."""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from functools import cache
from typing import Annotated, Any, NamedTuple, Protocol, Union, get_args, get_origin, get_type_hints

Enclosing = list[tuple[type, dict[str, Any]]]  # the mappings around a value and the classes they are read as


class Rule(Protocol):
    """A rule for a value. `fault` completes "must be ..." for an invalid value; `schema` is the rule in JSON Schema."""

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
    """A list with at least `least` entries, all different if `unique`."""

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
    """Text that a regular expression matches fully; `what` describes it."""

    expression: str
    what: str

    def fault(self, value: str) -> str | None:
        return None if re.fullmatch(self.expression, value) else self.what

    def schema(self) -> dict[str, Any]:
        return {"pattern": f"^(?:{self.expression})$"}


@dataclass(frozen=True, eq=False)  # hashed by identity, as annotations are
class Parsed:
    """A value with a syntax of its own, such as an amount with a unit.

    `parse` takes the raw value and the mappings around it, outermost first; it raises ValueError with what the value
    must be, or FaultElsewhere.
    """

    parse: Callable[[Any, Enclosing], Any]
    written: dict[str, Any]  # JSON Schema
    examples: tuple[str, ...] = ()  # suggested in messages

    def schema(self) -> dict[str, Any]:
        return self.written


class FaultElsewhere(ValueError):
    """A value cannot be read because of another key, whose fault is reported."""


@dataclass(frozen=True, eq=False)  # hashed by identity, as annotations are
class Tagged:
    """A field that is one of several dataclasses: its key names the kind, whose own keys are next to it.

    `objective: Annotated[Objective, Tagged({"clm": Clm, "mlm": Mlm})]` reads {objective: mlm, mask_rate: 0.15, ...}.
    `key` is the key, if it is not the field's name.
    """

    kinds: dict[str, type]
    key: str | None = None

    def name_of(self, value: Any) -> str:
        return next(name for name, cls in self.kinds.items() if cls is type(value))

    def owners(self) -> dict[str, list[str]]:
        """Return the keys of all kinds, each with the kinds that have it."""
        owners: dict[str, list[str]] = {}
        for kind, cls in self.kinds.items():
            for setting in settings_of(cls):
                owners.setdefault(setting.name, []).append(kind)
        return owners


@dataclass(frozen=True)
class Flag:
    """How --help shows a field, in addition to its type."""

    metavar: str | None = None
    group: str | None = None
    aliases: tuple[str, ...] = ()


def _any_text(raw: Any, _: Enclosing) -> str:
    if not isinstance(raw, str):
        raise ValueError("text")
    return raw


AnyText = Annotated[str, Parsed(_any_text, {"type": "string"})]  # may be empty or multi-line


class Setting(NamedTuple):
    """A field, whose key is `name`, and its parsed annotation. `items` are the element types of a tuple or dict."""

    field: str
    name: str
    kind: Any
    items: tuple[Setting, ...]
    ellipsis: bool  # a tuple of any length
    optional: bool
    marks: tuple[Any, ...]
    default: Any  # MISSING if the key is required

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
    """Return the fields of a settings dataclass, in order. Raise ValueError if a key would have two meanings."""
    hints = get_type_hints(cls, include_extras=True)
    own = tuple(setting_of(hints[field.name], field.name, _default(field)) for field in dataclasses.fields(cls))
    names = [setting.name for setting in own]
    names += [name for setting in own if (tagged := setting.mark(Tagged)) for name in tagged.owners()]
    if len(set(names)) < len(names):
        raise ValueError(f"{cls.__name__} has the key {max(names, key=names.count)} twice")
    return own


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def setting_of(hint: Any, name: str = "", default: Any = MISSING) -> Setting:
    """An annotation, taken apart."""
    marks: tuple[Any, ...] = ()
    optional = False
    while get_origin(hint) in (Annotated, Union, types.UnionType):
        if get_origin(hint) is Annotated:
            marks, hint = (*hint.__metadata__, *marks), hint.__origin__
        else:  # X | None; or X | Y, where a Parsed converts the value
            optional, hint = optional or type(None) in get_args(hint), get_args(hint)[0]
    arguments = get_args(hint)
    ellipsis = Ellipsis in arguments
    kind = get_origin(hint) or hint
    chosen = arguments[:1] if ellipsis else arguments[1:] if kind is dict else arguments
    items = tuple(setting_of(argument) for argument in chosen)
    key = next((mark.key for mark in marks if isinstance(mark, Tagged) and mark.key), name)
    return Setting(name, key, kind, items, ellipsis, optional, marks, default)


def join_key(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)
