"""What a program's steps hold of the model: matrices as they are stored, vectors and numbers in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from taut.coded import STORED, Decoded, Turned
from taut.facts.moves import SWAPS, is_move, move
from taut.graph import Graph, shape
from taut.lift._match import is_call
from taut.ops.layer_norm import layer_norm
from taut.runtime.pieces import width
from taut.runtime.steps import Norm, Weight
from taut.runtime.tables import CONSTANT, Tables
from taut.values import Original, Stacked, Value, reader

Convert = Callable[[Tensor], Weight]
"""How a matrix is kept that was read from the checkpoint."""


class Parts:
    """Constants of a step graph, each read once. `convert` decides how a matrix is kept."""

    def __init__(self, graph: Graph, tables: Tables, convert: Convert) -> None:
        self.graph, self.tables, self.convert = graph, tables, convert
        self.constants: dict[fx.Node, Tensor] = {}
        self.weights: dict[fx.Node, Weight] = {}

    def constant(self, node: fx.Node) -> Tensor:
        """A constant's value; a parameter's in float32."""
        if node not in self.constants:
            self.constants[node] = self.tables.constant(node)
        return self.constants[node]

    def weight(self, node: fx.Node) -> Weight:
        """A matrix as it is stored, codes as codes: what only moves a parameter keeps its dtype."""
        if node not in self.weights:
            coded = self.coded(node) if self.convert is Weight else None
            self.weights[node] = coded or self.convert(self.stored(node))
        return self.weights[node]

    def coded(self, node: Any) -> Weight | None:
        """The codes and scales of a matrix, or of rows of one, that is kept so."""
        if node.op == "placeholder" and node.meta["kind"] == "parameter":
            return codes_of(self.graph, self.graph.values[node.meta["tensor"]])
        if not is_move(node) or self.tables.kinds[node.args[0]] != CONSTANT:
            return None
        source = node.args[0]
        if source.op == "placeholder" and isinstance(self.graph.values.get(source.meta["tensor"]), Turned):
            turned: Any = self.graph.values[source.meta["tensor"]]
            return codes_of(self.graph, turned.x) if is_call(node, *SWAPS) else None
        whole = self.coded(source)
        rows = None if whole is None else _rows(node, shape(source))
        return (
            None
            if whole is None or rows is None or whole.scale is None
            else Weight(whole.data[rows], whole.scale[rows])
        )

    def stored(self, node: Any) -> Tensor:
        if node.op == "placeholder" and node.meta["kind"] == "parameter":
            return as_stored(self.graph, node.meta["tensor"])
        if is_move(node) and self.tables.kinds[node.args[0]] == CONSTANT:
            return move(node, self.stored(node.args[0])).contiguous()  # type: ignore[union-attr]
        return self.constant(node)

    def vector(self, node: Any) -> Tensor | None:
        return None if node is None else self.constant(node).flatten().float()

    def unless(self, node: Any, idle: int) -> Tensor | None:
        """A vector, unless all of it is the number that changes nothing: a gain that was folded away costs no time."""
        found = self.vector(node)
        return None if found is None or bool((found == idle).all()) else found

    def norm_of(self, given: dict[str, Any]) -> Norm | None:
        """The norm that is fused into a layer."""
        if given.get("eps") is None:
            return None
        vectors = self.unless(given.get("gain"), 1), self.unless(given.get("shift"), 0)
        return Norm(float(given["eps"]), *vectors, bool(given.get("centred", False)))

    def own_norm(self, node: Any) -> Norm | None:
        """A norm's node as a norm over its last axis; None where something of it is not constant."""
        centred = node.target is layer_norm
        names = ("gain", "bias", "eps") if centred else ("gain", "eps")
        given: dict[str, Any] = (
            {"eps": 1e-5 if centred else 1e-6} | dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
        )
        vectors = [given.get("gain"), given.get("bias")]
        if not isinstance(given["eps"], float | int) or any(v is not None and not self._fits(v, node) for v in vectors):
            return None
        return Norm(float(given["eps"]), self.unless(vectors[0], 1), self.unless(vectors[1], 0), centred)

    def _fits(self, vector: fx.Node, node: fx.Node) -> bool:
        return self.tables.kinds[vector] == CONSTANT and width(vector) == shape(node)[-1]

    def number(self, value: Any) -> float | None:
        """A number, or a constant of one element; None for what is neither."""
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, fx.Node) and self.tables.kinds[value] == CONSTANT and width(value) == 1:
            return float(self.constant(value))
        return None


def codes_of(graph: Graph, value: Value) -> Weight | None:
    """The codes and scales of a value that is kept so, or of several such stacked; None for any other."""
    parts = value.parts if isinstance(value, Stacked) else (value,)
    stored = [part for part in parts if isinstance(part, Decoded)]
    if len(stored) < len(parts) or len({part.bits for part in stored}) > 1:
        return None
    columns = zip(*((part.codes, part.scale) for part in stored), strict=True)
    dtypes = STORED[stored[0].bits]
    data, scale = (torch.cat([_kept(graph, v, d) for v in column]) for column, d in zip(columns, dtypes, strict=True))
    return Weight(data, scale)


def _kept(graph: Graph, value: Value, dtype: torch.dtype) -> Tensor:
    """Codes or scales as they are stored, else made."""
    read = graph.read or reader(graph.tensors)
    return read(value.name, None) if isinstance(value, Original) else value.evaluate(read).to(dtype)


def _rows(node: fx.Node, size: tuple[int, ...]) -> Tensor | None:
    """The rows of a matrix that a movement picks, whole and in their order; None for any other movement."""
    if len(size) != 2 or len(shape(node)) != 2 or shape(node)[1] != size[1]:
        return None
    rows, columns = (
        move(node, index) for index in (torch.arange(size[0])[:, None].expand(size), torch.arange(size[1]).expand(size))
    )
    if not isinstance(rows, Tensor) or not isinstance(columns, Tensor):
        return None
    whole = torch.equal(columns, torch.arange(size[1]).expand(columns.shape))
    return rows[:, 0].clone() if whole and bool((rows == rows[:, :1]).all()) else None


def as_stored(graph: Graph, name: str) -> Tensor:
    """A parameter in the dtype in which it is stored; several stacked are put together as they are."""
    value = graph.values[name]
    if isinstance(value, Stacked) and all(isinstance(part, Original) for part in value.parts):
        read = graph.read or reader(graph.tensors)
        return torch.cat([read(part.name, None) for part in value.parts if isinstance(part, Original)])
    return graph.evaluate(name, None)
