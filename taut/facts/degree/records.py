"""What is known of one norm's scalar: the values that carry it, and where it ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from taut.facts.contraction import name_of
from taut.facts.scalars import Call


@dataclass(frozen=True)
class Step:
    """The scalar of a value from that of its sources: `calls` one after the other (several sources go in as a list)."""

    sources: tuple[fx.Node, ...]
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True)
class Scaled:
    """A value that carries the scalar to the power `degree`.

    `ids` has the shape of the scalar: it broadcasts to the value, has as many axes, and says per element which of the
    norm's tokens the scalar belongs to (a list of such where the node returns several values). `step` is None at the
    norm itself. `behind` tells whether a product with a parameter lies between the norm and here.
    """

    degree: int
    ids: Any
    step: Step | None
    behind: bool = False


@dataclass(frozen=True)
class Edge:
    """`user` needs `source` times the scalar to the power `degree`, or the model is another function.

    With `before_bias`, `user` is a linear layer, `source` is that layer too, and the scalar belongs between its
    product and its bias.
    """

    user: fx.Node
    source: fx.Node
    degree: int
    reason: str
    behind: bool
    before_bias: bool = False

    def __str__(self) -> str:
        return self.reason if self.user.op == "output" else f"{name_of(self.user)} {self.reason}"


@dataclass(frozen=True)
class Absorber:
    """A norm behind the norm, whose own division makes degree `degree` 0 but for its epsilon."""

    norm: fx.Node
    degree: int


@dataclass
class Reach:
    """How far one norm's scalar reaches: the norms that absorb it, and the frontier where it must be put in."""

    norm: fx.Node
    scaled: dict[fx.Node, Scaled] = field(default_factory=dict)
    absorbers: list[Absorber] = field(default_factory=list)
    frontier: list[Edge] = field(default_factory=list)
