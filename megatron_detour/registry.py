"""Registries of kinds, such as objectives: every subclass of a base class in a module of its package."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from typing import TypeVar

T = TypeVar("T")


def registry(package: str, base: type[T], first: type[T] | None = None, key: str = "name") -> dict[str, type[T]]:
    """Import the modules of `package` and return the subclasses of `base` by `key`: `first`, then in sorted order.

    A subclass without a `key` of its own is a variant of another and is left out.
    """
    for module in pkgutil.iter_modules(sys.modules[package].__path__):
        importlib.import_module(f"{package}.{module.name}")
    kinds = {getattr(kind, key): kind for kind in _subclasses(base) if key in vars(kind)}
    return ({getattr(first, key): first} if first else {}) | dict(sorted(kinds.items()))


def _subclasses(base: type[T]) -> list[type[T]]:
    return [kind for sub in base.__subclasses__() for kind in (sub, *_subclasses(sub))]
