"""Pieces of a step graph that no word says: run by torch, a row at a time or all rows at once, never mixing them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from taut.graph import call, shape


@dataclass(frozen=True, eq=False)
class Piece:
    """Nodes in the order in which they run; `inputs` come as rows of float32, `constants` are kept."""

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outs: tuple[fx.Node, ...]
    constants: Mapping[fx.Node, Tensor]

    def __call__(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """Rows (rows, width) of every input give rows of every output."""
        if rows[0].shape[0] == 1:
            return tuple(out[None] for out in self._one(*(row[0] for row in rows)))
        try:
            return torch.vmap(self._one, chunk_size=64)(*rows)
        except RuntimeError:  # some operation knows no batches
            each = [self._one(*row) for row in zip(*rows, strict=True)]
            return tuple(torch.stack(out) for out in zip(*each, strict=True))

    def _one(self, *row: Tensor) -> tuple[Tensor, ...]:
        env: dict[fx.Node, Any] = dict(self.constants)
        for node, value in zip(self.inputs, row, strict=True):
            wanted = node.meta["val"]
            dtype = value.dtype if wanted.is_floating_point() else wanted.dtype
            env[node] = value.reshape(wanted.shape).to(dtype)
        for node in self.nodes:
            env[node] = call(node, env.__getitem__, row[0].device)
        return tuple(env[out].reshape(-1).to(row[0].dtype) for out in self.outs)


def width(node: fx.Node) -> int:
    return math.prod(shape(node))


@dataclass(frozen=True, eq=False)
class Gather:
    """Columns of a buffer, in an order that is no interval."""

    index: Tensor

    def __call__(self, rows: Tensor) -> tuple[Tensor, ...]:
        return (rows[:, self.index],)
