"""What one run of `bench` has found."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taut.cost import Cost
from taut.machine import Machine
from taut.parity import Parity
from taut.plans import Plan
from taut.whole_file import write_text

if TYPE_CHECKING:
    from taut.layers import Layer


@dataclass
class Timed:
    """Seconds a pass (median and best), and what they amount to; slack below 1 means that a cache helped.

    `bytes` are those that it must read: the weights as they are stored, or compressed where they are read so.
    """

    runner: str
    workload: str
    seconds: float
    best: float
    bytes: float
    flops: float
    slack: float

    @property
    def cached(self) -> bool:
        return self.slack < 1

    def as_dict(self) -> dict[str, Any]:
        rates = {"bytes_per_s": self.bytes / self.seconds, "flops_per_s": self.flops / self.seconds}
        return asdict(self) | rates | {"cached": self.cached}


@dataclass
class Bench:
    """One run. `rows` is empty where parity failed; `failed` says which runners could not run, and why.

    `apart` has the reason for each step that the engine leaves to torch; `plans` say what was applied and refused, to
    the checkpoint (where it is in taut form) and to the decoding step; `layers` have the time of each layer. The engine
    decodes by copies of the weights that are compressed, without loss, to `compression` of their size.
    """

    model: str
    weights: str
    prompt: int
    tokens: int
    parity: Parity
    machine: Machine
    rows: list[Timed] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    apart: list[str] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    costs: list[Cost] = field(default_factory=list)
    compression: float = 1.0

    @property
    def passed(self) -> bool:
        return self.parity.passed

    @property
    def compressed(self) -> str:
        """How the engine's weights are read, in words; empty where as they are stored."""
        if self.compression == 1:
            return ""
        return f"taut decodes by copies of the weights, compressed without loss to {self.compression:.0%}"

    def as_dict(self) -> dict[str, Any]:
        shown = {"model": self.model, "weights": self.weights, "prompt": self.prompt, "tokens": self.tokens}
        rows = [row.as_dict() for row in self.rows]
        shown |= {"parity": self.parity.as_dict(), "rows": rows, "failed": self.failed}
        shown |= {"apart": self.apart, "plans": [plan.as_dict() for plan in self.plans]}
        shown["compression"] = self.compression
        shown["layers"] = [layer.as_dict() for layer in self.layers]
        return shown | {"machine": asdict(self.machine), "environment": self.environment}

    def save(self, path: Path) -> None:
        """Raises BadInput where the file cannot be written."""
        write_text(path, json.dumps(self.as_dict(), indent=1) + "\n")
