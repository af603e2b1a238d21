"""Techniques are found by listing folders; no list is edited to add one."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")


def modules(package: str) -> Iterator[ModuleType]:
    """Every module in a package's folder, imported, in the order of their names."""
    for info in sorted(pkgutil.iter_modules(importlib.import_module(package).__path__), key=lambda m: m.name):
        if not info.name.startswith("_"):
            yield importlib.import_module(f"{package}.{info.name}")


def find(package: str, kind: type[T]) -> dict[str, T]:
    """Every object of a kind that a package's modules hold at their top level, by name."""
    found: dict[str, T] = {}
    for module in modules(package):
        for name, value in vars(module).items():
            if isinstance(value, kind):
                found.setdefault(name, value)
    return found
