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

KINDS = {"rewrite": "Rewrites", "op": "Ops", "module": "Modules"}
"""The kinds of techniques with their headings, in the order in which they are listed."""


@dataclass(frozen=True)
class Technique:
    """One technique; `source` and `differs` are as in its file's docstring. Modules of one file are one technique."""

    kind: str
    name: str
    summary: str
    source: str
    differs: str = ""
    exactness: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def catalogue() -> list[Technique]:
    """Every technique, by kind and name."""
    nn_folders = pkgutil.iter_modules(importlib.import_module("taut.nn").__path__)
    folders = [f"taut.nn.{info.name}" for info in nn_folders if info.ispkg]
    found = [t for folder in ("taut.ops", "taut.rewrites", *folders) for file in modules(folder) for t in _of(file)]
    order = list(KINDS)
    return sorted(found, key=lambda t: (order.index(t.kind), t.name.lower()))


def _of(file: ModuleType) -> Iterator[Technique]:
    """The techniques of one file: each of its rewrites and ops, and its modules together."""
    summary = (file.__doc__ or "").strip().splitlines()[:1]
    source, differs = paragraph(file, "Source"), paragraph(file, "Differs")
    if not summary or not source:
        return
    classes = []
    for name, value in vars(file).items():
        if isinstance(value, Rewrite):
            kept = f" on {value.promises}" if value.promises else ""
            yield Technique("rewrite", value.name, summary[0], source, differs, value.exactness.name + kept)
        elif isinstance(value, Op) and value.__module__ == file.__name__:
            yield Technique("op", value.name, summary[0], source, differs)
        elif _is_own_module(file, name, value):
            classes.append(name)
    if classes:
        yield Technique("module", ", ".join(classes), summary[0], source, differs)


def _is_own_module(file: ModuleType, name: str, value: Any) -> bool:
    own = inspect.isclass(value) and issubclass(value, nn.Module) and value.__module__ == file.__name__
    return own and not name.startswith("_")


def paragraph(file: ModuleType, name: str) -> str:
    """A paragraph `Name: ...` of a file's docstring, on one line."""
    match = re.search(rf"^{name}: (.+?)(?=\n\s*\n|\n(?:Source|Differs): |\Z)", file.__doc__ or "", re.S | re.M)
    return " ".join(match.group(1).split()) if match else ""


def markdown(rows: list[Technique]) -> str:
    """The catalogue as tables for the README, one for each kind."""
    return "\n\n".join(_table(title, [row for row in rows if row.kind == kind]) for kind, title in KINDS.items())


def _table(title: str, rows: list[Technique]) -> str:
    promised = any(row.exactness for row in rows)
    heads = [title, *(["Promise"] if promised else []), "What it is", "Source"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        names = ", ".join(f"`{name}`" for name in row.name.split(", "))
        cells = [names, *([row.exactness or ""] if promised else []), row.summary, row.source]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
