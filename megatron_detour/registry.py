"""Registries of kinds, such as objectives: every subclass of a base class in a module of its package."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from typing import TypeVar

T = TypeVar("T")


def registry(package: str, base: type[T], first: type[T]) -> dict[str, type[T]]:
    """Import the modules of `package` and return the subclasses of `base` by `name`: `first`, then by name."""
    for module in pkgutil.iter_modules(sys.modules[package].__path__):
        importlib.import_module(f"{package}.{module.name}")
    return {first.name: first} | dict(sorted(_by_name(base).items()))


def _by_name(base: type[T]) -> dict[str, type[T]]:
    return {kind.name: kind for sub in base.__subclasses__() for kind in (sub, *_by_name(sub).values())}
