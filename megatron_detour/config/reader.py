"""From YAML to a RunConfig: overrides, types, and every fault told at once.

`load(path, overrides)` reads the file, applies `key=value` overrides and returns a RunConfig, or raises one
DetourError that lists every fault with the key to change.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import types
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from megatron_detour.config.checks import Faults, check
from megatron_detour.config.schema import Phase, RunConfig, Seconds, join_key
from megatron_detour.errors import DetourError, format_faults, nearest
from megatron_detour.objectives import KINDS, REFERENCE, Objective
from megatron_detour.structured import parse_yaml, read_yaml

GREATEST = 2**53  # of whole numbers
MOST = 10**15  # of tokens and seconds: what lies above is a slip, and more than floating-point numbers tell apart
SHOWN = 200  # characters of a wrong value


def load(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Reads a run file and applies overrides such as ``phases.detour.tokens=1B``. Raises DetourError."""
    path = Path(path)
    try:
        raw = read_yaml(path)
    except FileNotFoundError:
        raise DetourError(f"{path}: there is no such run file") from None
    if not isinstance(raw, dict):
        raise DetourError(f"{path}: a run file is a YAML mapping with keys such as name, model, data and phases")
    for override in overrides or []:
        _apply(raw, override)
    config = from_dict(raw, str(path))
    return dataclasses.replace(config, deepspeed=_beside(config.deepspeed, path))


def from_dict(raw: dict[str, Any], origin: str = "run file") -> RunConfig:
    """Builds and checks a RunConfig from plain mappings. Raises DetourError with all faults."""
    faults = Faults()
    config = _Reader(faults, raw).build(RunConfig, raw, "")
    check(config, faults)
    if faults.found:
        raise DetourError(f"{origin}: {format_faults(faults.found)}")
    return config


class _NeedsSizes(ValueError):
    """An amount in steps, whose size the run file does not say."""


def parse_tokens(value: Any, tokens_per_step: int | None = None) -> int:
    """Reads an amount of tokens: an integer, "50B", "1.5M", "200k" or "3 steps". Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = re.fullmatch(r"\s*([\d_,]{0,30}\.?\d{1,30}(?:[eE][+-]?\d\d?)?)\s*(k|M|B|T|steps?)?\s*", str(value))
    if not match or isinstance(value, bool):
        raise ValueError('an amount of tokens, such as 50B, 100M, 3145728 or "3 steps", is needed')
    number = Fraction(match[1].replace(",", "").replace("_", ""))
    unit = match[2] or ""
    if unit.startswith("step"):
        if tokens_per_step is None:
            raise _NeedsSizes("steps need batch.sequences and data.sequence_length, which are missing or wrong")
        scale = tokens_per_step
    else:
        scale = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}[unit]
    if (number * scale).denominator != 1:
        raise ValueError("an amount of tokens must be a whole number")
    return int(number * scale)


def parse_seconds(value: Any) -> int:
    """Reads a time: seconds as an integer, or "23h30m", "90m", "2d", "45s". Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    part = r"\s*(?:(\d{1,9})%s)?\s*"
    match = re.fullmatch("".join(part % unit for unit in "dhms"), str(value))
    if not match or not any(match.groups()):
        raise ValueError("a time, such as 23h30m, 90m or 3600, is needed")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


class _Reader:
    """Turns plain mappings into dataclasses by their annotations.

    What does not fit is told to `faults` and replaced by some value of its type, so that the rest can be checked.
    """

    def __init__(self, faults: Faults, whole: Any) -> None:
        self.faults = faults
        self.sizes = (_at(whole, "batch", "sequences"), _at(whole, "data", "sequence_length"))  # of a step

    def build(self, cls: type, raw: Any, key: str) -> Any:
        if not isinstance(raw, dict):
            self.faults.unreadable(key, f"a mapping with {', '.join(_names(cls))} is needed, it is {_shown(raw)}")
            return _any_value(cls)
        values = {}
        if cls is Phase and "objective" in raw:
            raw, values["objective"] = self._objective(raw, key)
        hints = get_type_hints(cls, include_extras=True)
        known = {f.name: f for f in dataclasses.fields(cls) if f.name not in values}
        for name in raw:
            if name not in known:
                self.faults.add(join_key(key, name), f"there is no such key{nearest(str(name), list(known))}")
        with self._steps_of(cls, raw):
            for name, declared in known.items():
                if name in raw:
                    values[name] = self._value(hints[name], raw[name], join_key(key, name))
                elif _is_required(declared):
                    self.faults.unreadable(join_key(key, name), "this key is missing")
                    values[name] = _any_value(hints[name])
        return cls(**values)

    def _objective(self, phase: dict[str, Any], key: str) -> tuple[dict[str, Any], Objective]:
        """What is left of a phase without the objective's name and keys, and the objective."""
        name = phase["objective"]
        kind = KINDS.get(name) if isinstance(name, str) else None
        if kind is None:
            known = sorted(KINDS)
            text = f"{_shown(name)} is not one of {', '.join(known)}{nearest(str(name), known)}"
            self.faults.unreadable(f"{key}.objective", text)
        keys = {own for cls in KINDS.values() for own in cls.run_file_keys()}
        own = {key for key in phase if kind and key in kind.run_file_keys()}
        for other in keys.intersection(phase) - own if kind else ():
            if phase[other]:  # null and false say nothing
                self.faults.add(f"{key}.{other}", f"a phase of {name} has no such key; remove the key", [f"{key}.objective"])
        rest = {name: value for name, value in phase.items() if name not in {*keys, "objective"}}
        return rest, self.build(kind or REFERENCE, {name: phase[name] for name in own}, key)

    def _value(self, hint: Any, raw: Any, key: str) -> Any:
        origin, arguments = get_origin(hint), get_args(hint)
        if origin in (Union, types.UnionType):  # always `X | None`
            return None if raw is None else self._value(arguments[0], raw, key)
        if dataclasses.is_dataclass(hint):
            return self.build(hint, raw, key)
        try:
            if origin is Annotated:
                amount = parse_seconds(raw) if hint is Seconds else parse_tokens(raw, _product(*self.sizes))
                if abs(amount) > MOST:
                    raise ValueError(f"an amount up to {MOST:,} is needed")
                return amount
            if origin is tuple:
                return self._sequence(arguments, raw, key)
            return _mapping(raw) if origin is dict else _scalar(hint, raw)
        except _NeedsSizes:
            self.faults.unread.append(key)  # what is wrong with the sizes is told of them
        except ValueError as error:
            self.faults.unreadable(key, f"{error}, it is {_shown(raw)}")
        return _any_value(hint)

    def _sequence(self, arguments: tuple, raw: Any, key: str) -> tuple:
        if not isinstance(raw, list):
            raise ValueError("a list is needed")
        if arguments[-1] is not Ellipsis and len(raw) != len(arguments):
            raise ValueError(f"{len(arguments)} values are needed, there are {len(raw)}")
        return tuple(self._value(arguments[0], item, f"{key}.{i}") for i, item in enumerate(raw))

    @contextmanager
    def _steps_of(self, cls: type, raw: dict[str, Any]) -> Iterator[None]:
        """Within a phase that has a batch or a length of its own, "3 steps" are the phase's."""
        outside = self.sizes
        if cls is Phase:
            own = (raw.get("sequences"), raw.get("sequence_length"))
            self.sizes = tuple(mine or whole for mine, whole in zip(own, outside, strict=True))
        yield
        self.sizes = outside


def _has_controls(text: str) -> bool:
    """Line breaks, control characters, bidirectional marks, halves of characters."""
    return any(unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") for character in text)


def _shown(raw: Any) -> str:
    text = repr(raw)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."


def _scalar(hint: type, raw: Any) -> Any:
    if hint is float and not isinstance(raw, bool):
        try:  # YAML 1.1 reads 2e-4 as a string
            number = float(raw)
        except (TypeError, ValueError, OverflowError):
            raise ValueError("a number is needed") from None
        if not math.isfinite(number):
            raise ValueError("a finite number is needed")
        return number
    if type(raw) is not hint:
        wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[hint]
        raise ValueError(f"{wanted} is needed")
    if hint is int and abs(raw) > GREATEST:
        raise ValueError(f"a number up to {GREATEST:,} is needed")
    if hint is str and not raw.strip():
        raise ValueError("must not be empty")
    if hint is str and _has_controls(raw):
        raise ValueError("a text in one line without control characters is needed")
    return raw


def _mapping(raw: Any) -> dict:
    if not isinstance(raw, dict):
        raise ValueError("a mapping is needed")
    return raw


def _any_value(hint: Any) -> Any:
    """Some value of a type, in the place of one that was refused."""
    if get_origin(hint) in (Union, types.UnionType):
        return None
    if hint is Objective:
        return REFERENCE(0.5)
    if dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint, include_extras=True)
        return hint(**{f.name: _any_value(hints[f.name]) for f in dataclasses.fields(hint) if _is_required(f)})
    if get_origin(hint) is tuple:
        return ()
    return {float: 0.5, int: 1, str: "", bool: False}.get(hint, 1)


def _is_required(declared: dataclasses.Field) -> bool:
    return declared.default is dataclasses.MISSING and declared.default_factory is dataclasses.MISSING


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise DetourError(f"override {override!r}: write it as key=value, for instance phases.detour.tokens=1B")
    if _has_controls(override):  # YAML would make a space of a line break
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
    if isinstance(here, list):
        here[_position(here, last, override)] = value
    else:
        here[last] = value


def _position(items: list, part: str, override: str) -> int:
    if part.isdecimal() and int(part) < len(items):
        return int(part)
    names = [str(item.get("name", item.get("prefix"))) if isinstance(item, dict) else str(item) for item in items]
    if part in names:
        return names.index(part)
    raise DetourError(f"override {override!r}: {part!r} is neither a number below {len(items)} nor one of {names}")


def _beside(file: str, run_file: Path) -> str:
    """A relative file is looked for from the current folder first, then from the run file's."""
    beside = run_file.parent / file
    return os.path.normpath(beside) if not Path(file).exists() and beside.exists() else file


def _at(raw: Any, section: str, key: str) -> Any:
    return raw[section].get(key) if isinstance(raw.get(section), dict) else None


def _product(sequences: Any, length: Any) -> int | None:
    """Tokens a step, or None where the run file does not say them."""
    known = all(type(size) is int and size > 0 for size in (sequences, length))
    return sequences * length if known else None


def _names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]
