"""What a program's steps hold of the model: matrices as they are stored, vectors and numbers in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from taut.facts.moves import is_move, move
from taut.graph import Graph, shape
from taut.ops.layer_norm import layer_norm
from taut.runtime.pieces import width
from taut.runtime.steps import Norm, Weight
from taut.runtime.tables import CONSTANT, Tables
from taut.values import Original, Stacked, reader

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
        """A matrix as it is stored: what only moves a parameter keeps its dtype."""
        if node not in self.weights:
            self.weights[node] = self.convert(self.stored(node))
        return self.weights[node]

    def stored(self, node: Any) -> Tensor:
        if node.op == "placeholder" and node.meta["kind"] == "parameter":
            return as_stored(self.graph, node.meta["tensor"])
        if is_move(node) and self.tables.kinds[node.args[0]] == CONSTANT:
            return move(node, self.stored(node.args[0])).contiguous()  # type: ignore[union-attr]
        return self.constant(node)

    def vector(self, node: Any) -> Tensor | None:
        return None if node is None else self.constant(node).flatten().float()

    def norm_of(self, given: dict[str, Any]) -> Norm | None:
        """The norm that is fused into a layer."""
        if given.get("eps") is None:
            return None
        gain, shift = self.vector(given.get("gain")), self.vector(given.get("shift"))
        return Norm(float(given["eps"]), gain, shift, bool(given.get("centred", False)))

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
        return Norm(float(given["eps"]), self.vector(vectors[0]), self.vector(vectors[1]), centred)

    def _fits(self, vector: fx.Node, node: fx.Node) -> bool:
        return self.tables.kinds[vector] == CONSTANT and width(vector) == shape(node)[-1]

    def number(self, value: Any) -> float | None:
        """A number, or a constant of one element; None for what is neither."""
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, fx.Node) and self.tables.kinds[value] == CONSTANT and width(value) == 1:
            return float(self.constant(value))
        return None


def as_stored(graph: Graph, name: str) -> Tensor:
    """A parameter in the dtype in which it is stored; several stacked are put together as they are."""
    value = graph.values[name]
    if isinstance(value, Stacked) and all(isinstance(part, Original) for part in value.parts):
        read = graph.read or reader(graph.tensors)
        return torch.cat([read(part.name, None) for part in value.parts if isinstance(part, Original)])
    return graph.evaluate(name, None)
