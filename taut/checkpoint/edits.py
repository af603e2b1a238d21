"""What may become of a tensor on disk: anything that can give its rows in float64, with forms that stream fast."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from taut.checkpoint.shards import TensorInfo

Read = Callable[[str, slice | None], Tensor]
"""Reads (some rows of) a checkpoint's tensor by its name on disk, in its own dtype."""


class Edit(Protocol):
    """A tensor's new content. `block` gives its rows (a slice along the first axis) in float64, unrounded."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def block(self, read: Read, rows: slice) -> Tensor: ...


class Alike:
    """What an edit is that keeps the shape and the dtype of its tensor."""

    info: TensorInfo

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.info.dtype


@dataclass(frozen=True, eq=False)
class Scale(Alike):
    """A tensor of the checkpoint times a float64 vector along one axis; it keeps its name, shape and dtype."""

    name: str
    info: TensorInfo
    axis: int
    vector: Tensor

    def __post_init__(self) -> None:
        if not 0 <= self.axis < len(self.info.shape) or self.vector.shape != (self.info.shape[self.axis],):
            raise ValueError(
                f"{self.name}: {tuple(self.vector.shape)} does not fit axis {self.axis} of {self.info.shape}"
            )
        if self.vector.dtype is not torch.float64 or not self.info.dtype.is_floating_point:
            raise TypeError(f"{self.name}: scales a floating tensor by a float64 vector")

    @property
    def inner(self) -> int:
        """How many consecutive elements share one factor."""
        return math.prod(self.shape[self.axis + 1 :])

    @functools.cached_property
    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """The vector in float64 and in float32, the latter empty where some of it is no normal number there."""
        exact, sizes = np.ascontiguousarray(self.vector.numpy()), self.vector.abs()
        normal = bool(((sizes > 2.0**-100) & (sizes < 2.0**100)).all())
        return exact, exact.astype(np.float32) if normal else np.empty(0, np.float32)

    def block(self, read: Read, rows: slice) -> Tensor:
        x = read(self.name, rows).double()
        vector = self.vector[rows] if self.axis == 0 else self.vector
        return x * vector.view([-1 if axis == self.axis else 1 for axis in range(x.ndim)])


@dataclass(frozen=True)
class Fill:
    """A constant tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    value: float

    def block(self, read: Read, rows: slice) -> Tensor:
        count = [len(range(*rows.indices(n))) for n in self.shape[:1]]
        return torch.full((*count, *self.shape[1:]), self.value, dtype=torch.float64)


@dataclass(frozen=True)
class Copy(Alike):
    """A tensor of the checkpoint as it stands, any dtype, perhaps under another name."""

    name: str
    info: TensorInfo

    def block(self, read: Read, rows: slice) -> Tensor:
        return read(self.name, rows).double()
