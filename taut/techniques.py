"""The catalogue: every op, rewrite and module with its source, read from the docstrings of their files."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

from torch import nn

from taut.catalogue import modules
from taut.op import Op
from taut.rewrite import Rewrite


@dataclass(frozen=True)
class Technique:
    """One technique; `source` and `differs` are as in its file's docstring."""

    kind: str
    name: str
    summary: str
    source: str
    differs: str = ""
    exactness: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def catalogue() -> list[Technique]:
    """Every technique, sorted by kind and name."""
    found = [*_in("taut.ops", Op), *_in("taut.rewrites", Rewrite)]
    for info in pkgutil.iter_modules(importlib.import_module("taut.nn").__path__):
        if info.ispkg:
            found += _in(f"taut.nn.{info.name}", nn.Module)
    return sorted(set(found), key=lambda t: (t.kind, t.name))


def _in(package: str, kind: type) -> Iterator[Technique]:
    for module in modules(package):
        source = _field(module, "Source")
        if not source:
            continue
        summary = (module.__doc__ or "").strip().splitlines()[0]
        for name, value in vars(module).items():
            if _is_own(module, name, value, kind):
                exactness = value.exactness.name if isinstance(value, Rewrite) else None
                word = {Op: "op", Rewrite: "rewrite"}.get(kind, "module")
                yield Technique(word, name, summary, source, _field(module, "Differs"), exactness)


def _is_own(module: ModuleType, name: str, value: Any, kind: type) -> bool:
    if name.startswith("_"):
        return False
    if kind is nn.Module:
        return inspect.isclass(value) and issubclass(value, nn.Module) and value.__module__ == module.__name__
    if kind is Op:
        return isinstance(value, Op) and value.__module__ == module.__name__
    return isinstance(value, kind)


def _field(module: ModuleType, name: str) -> str:
    """A paragraph `Name: ...` of a module's docstring, on one line."""
    match = re.search(rf"^{name}: (.+?)(?=\n\s*\n|\n[A-Z]\w+: |\Z)", module.__doc__ or "", re.S | re.M)
    return " ".join(match.group(1).split()) if match else ""


def markdown(rows: list[Technique]) -> str:
    """The catalogue as a table for the README."""
    lines = ["| kind | name | promise | what it is | source |", "|---|---|---|---|---|"]
    for row in rows:
        cells = (row.kind, f"`{row.name}`", row.exactness or "", row.summary, row.source)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
