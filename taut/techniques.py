"""The catalogue: every op, rewrite, module and other method with its source, read from the files' docstrings."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from taut.catalogue import modules
from taut.op import Op
from taut.rewrite import Rewrite

KINDS = {"rewrite": "Rewrites", "op": "Ops", "module": "Modules", "method": "Methods"}
"""The kinds of techniques with their headings, in the order in which they are listed."""


@dataclass(frozen=True)
class Technique:
    """One technique; `source` and `differs` are as in its file's docstring. Modules of one file are one technique; a
    file of functions alone (a number format, an analysis, an emulated unit) is a method."""

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
    folders = ["taut.ops", "taut.rewrites", "taut.formats", "taut.nn"]
    folders += [f"taut.nn.{info.name}" for info in nn_folders if info.ispkg]
    files = [*(file for folder in folders for file in modules(folder)), *_sourced("taut")]
    found = [technique for file in files for technique in _of(file)]
    order = list(KINDS)
    return sorted(found, key=lambda t: (order.index(t.kind), t.name.lower()))


def _sourced(package: str) -> Iterator[ModuleType]:
    """The files of a package's own folder that name a source; no other is imported."""
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        found = importlib.util.find_spec(f"{package}.{info.name}")
        if not info.ispkg and found and "\nSource: " in Path(str(found.origin)).read_text():
            yield importlib.import_module(found.name)


def _of(file: ModuleType) -> Iterator[Technique]:
    """The techniques of one file: each of its rewrites and ops, and its modules together; else its functions."""
    summary = (file.__doc__ or "").strip().splitlines()[:1]
    source, differs = paragraph(file, "Source"), paragraph(file, "Differs")
    if not summary or not source:
        return
    classes, known = [], False
    for name, value in vars(file).items():
        known |= isinstance(value, Rewrite) or (isinstance(value, Op) and value.__module__ == file.__name__)
        if isinstance(value, Rewrite):
            kept = f" on {value.promises}" if value.promises else ""
            yield Technique("rewrite", value.name, summary[0], source, differs, value.exactness.name + kept)
        elif isinstance(value, Op) and value.__module__ == file.__name__:
            yield Technique("op", value.name, summary[0], source, differs)
        elif _is_own_module(file, name, value):
            classes.append(name)
    if classes:
        yield Technique("module", ", ".join(classes), summary[0], source, differs)
    elif not known:
        yield Technique("method", file.__name__.rpartition(".")[2], summary[0], source, differs)


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
