"""taut takes the slack out of a transformer, and proves that it is still the same model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["apply", "bench", "compile", "generate", "inspect", "plan", "trace", "verify"]

if TYPE_CHECKING:
    from taut.api import apply, inspect, plan, verify
    from taut.benchmark import bench
    from taut.generation import generate
    from taut.runtime.compiling import compile
    from taut.tracing import trace

_HOME = {
    "apply": "api",
    "bench": "benchmark",
    "compile": "runtime.compiling",
    "generate": "generation",
    "inspect": "api",
    "plan": "api",
    "verify": "api",
    "trace": "tracing",
}


def __getattr__(name: str) -> Any:
    """The verbs are imported when first used: `import taut` costs nothing beside `import torch`."""
    if name in _HOME:
        return getattr(importlib.import_module(f"taut.{_HOME[name]}"), name)
    raise AttributeError(f"module 'taut' has no attribute {name!r}")
