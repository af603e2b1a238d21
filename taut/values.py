"""What a parameter has become: a small expression over the tensors it was computed from.

A rewrite never computes a tensor. It says how the new one follows from the old ones, and so the same rewrite serves a
model in memory, a float64 proof and a checkpoint that is streamed from disk a few rows at a time. Everything is
evaluated in float64 and rounded once, when it is written. Expressions nest, which is how rewrites compose, and compare
by structure, which is how two sites that want the same rewrite of a shared parameter are recognised.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Rows = slice | None
Read = Callable[[str, Rows], Tensor]
"""Reads (some rows of) an original tensor by name, in any dtype."""


class Value(ABC):
    """An expression: a frozen dataclass, whose fields hold what it is made of."""

    @abstractmethod
    def evaluate(self, read: Read, rows: Rows = None) -> Tensor:
        """In float64; `rows` are along the first axis, None for all of them."""

    def children(self) -> tuple[Value, ...]:
        """The values that it is made of."""
        held = [item for field in vars(self).values() for item in (field if isinstance(field, tuple) else (field,))]
        return tuple(item for item in held if isinstance(item, Value))


@dataclass(frozen=True)
class Original(Value):
    """The tensor as it stands in the checkpoint: a parameter, or a buffer such as a running mean."""

    name: str

    def evaluate(self, read: Read, rows: Rows = None) -> Tensor:
        return read(self.name, rows).double()


@dataclass(frozen=True)
class Filled(Value):
    """A constant tensor."""

    shape: tuple[int, ...]
    value: float

    def evaluate(self, read: Read, rows: Rows = None) -> Tensor:
        whole = torch.full(self.shape, self.value, dtype=torch.float64)
        return whole if rows is None else whole[rows]


@dataclass(frozen=True)
class Affine(Value):
    """`scale * x + offset`: a gain as the model computes it from its parameter (`1 + w` has offset 1)."""

    x: Value
    scale: float
    offset: float

    def evaluate(self, read: Read, rows: Rows = None) -> Tensor:
        return self.x.evaluate(read, rows) * self.scale + self.offset


@dataclass(frozen=True)
class Pick(Value):
    """The elements of a small tensor, flattened, in the order in which a reader meets them."""

    x: Value
    order: tuple[int, ...] | None = None

    def evaluate(self, read: Read, rows: Rows = None) -> Tensor:
        flat = self.x.evaluate(read).flatten()
        picked = flat if self.order is None else flat[torch.tensor(self.order)]
        return picked if rows is None else picked[rows]


@dataclass(frozen=True)
class Scaled(Value):
    """A tensor multiplied along one axis by a vector."""

    x: Value
    by: Value
    axis: int

    def evaluate(self, read: Read, rows: Rows = None) -> Tensor:
        x = self.x.evaluate(read, rows)
        by = self.by.evaluate(read, rows if self.axis == 0 else None)
        return x * by.view([-1 if a == self.axis else 1 for a in range(x.ndim)])


@dataclass(frozen=True)
class Shifted(Value):
    """`bias + weight . shift`, the contraction over `axis` and over the axes in `summed` (a convolution's window).

    `keep` is the axis of the weight that runs along the bias.
    """

    bias: Value
    weight: Value
    shift: Value
    axis: int
    keep: int

    def evaluate(self, read: Read, rows: Rows = None) -> Tensor:
        by_row = self.keep == 0
        weight = self.weight.evaluate(read, rows if by_row else None)
        shift = self.shift.evaluate(read)
        moved = weight.movedim((self.keep, self.axis), (0, 1))
        moved = moved.reshape(*moved.shape[:2], -1).sum(-1) @ shift
        bias = self.bias.evaluate(read, rows)
        return bias + (moved if by_row or rows is None else moved[rows])


@dataclass(frozen=True)
class Centred(Value):
    """A tensor minus its mean along one axis."""

    x: Value
    axis: int

    def evaluate(self, read: Read, rows: Rows = None) -> Tensor:
        if self.axis == 0 and rows is not None:
            return self.evaluate(read)[rows]
        x = self.x.evaluate(read, rows)
        return x - x.mean(self.axis, keepdim=True)


@dataclass(frozen=True)
class Sum(Value):
    """`x + factor * y`, of one shape."""

    x: Value
    y: Value
    factor: float = 1.0

    def evaluate(self, read: Read, rows: Rows = None) -> Tensor:
        return self.x.evaluate(read, rows) + self.factor * self.y.evaluate(read, rows)


@dataclass(frozen=True)
class InverseRoot(Value):
    """`1 / sqrt(x + eps)`: what a variance divides by."""

    x: Value
    eps: float

    def evaluate(self, read: Read, rows: Rows = None) -> Tensor:
        return (self.x.evaluate(read, rows) + self.eps).rsqrt()


@dataclass(frozen=True)
class WithoutLast(Value):
    """A tensor without its last element along one axis; with `less`, that element is taken from each of the others."""

    x: Value
    axis: int
    less: bool = False

    def evaluate(self, read: Read, rows: Rows = None) -> Tensor:
        if self.axis == 0 and rows is not None:
            return self.evaluate(read)[rows]
        x = self.x.evaluate(read, rows)
        kept, last = x.split([x.shape[self.axis] - 1, 1], self.axis)
        return kept - last if self.less else kept


@dataclass(frozen=True)
class Stacked(Value):
    """Tensors one below the other, along the first axis; `heights` are their sizes there."""

    parts: tuple[Value, ...]
    heights: tuple[int, ...]

    def evaluate(self, read: Read, rows: Rows = None) -> Tensor:
        first, last, _ = (rows or slice(None)).indices(sum(self.heights))
        blocks, top = [], 0
        for part, height in zip(self.parts, self.heights, strict=True):
            inside = slice(max(first - top, 0), min(last - top, height))
            if inside.start < inside.stop:
                blocks.append(part.evaluate(read, inside))
            top += height
        return torch.cat(blocks)


def originals(value: Value) -> Iterator[str]:
    """The names of the original tensors that a value is computed from."""
    if isinstance(value, Original):
        yield value.name
    for child in value.children():
        yield from originals(child)


def reader(tensors) -> Read:
    """Read from a mapping of tensors that are in memory."""
    return lambda name, rows: tensors[name] if rows is None else tensors[name][rows]


def varies_along(value: Value) -> tuple[int, ...] | None:
    """The axes along which a value differs from the original by more than a common factor; None: any."""
    if isinstance(value, Original | Filled):
        return ()
    if isinstance(value, Scaled):
        inner = varies_along(value.x)
        return None if inner is None else tuple(sorted({*inner, value.axis}))
    return None
