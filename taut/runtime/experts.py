"""Products with the experts that a token chose: each expert's weight is read once, as it is stored, and none copied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from taut.graph import Graph, shape
from taut.lift._match import is_call
from taut.runtime.products import multiplied
from taut.runtime.tables import CONSTANT, LIVE, Tables

aten = torch.ops.aten
FEW = 64
"""Products for which a GPU copies the weights that were chosen."""


@dataclass(frozen=True, eq=False)
class Choice:
    """A product y[i] = x[i] weight[ids[i]]^T, or without the transposition where `turned`."""

    weight: fx.Node
    ids: fx.Node
    x: fx.Node
    turned: bool


@dataclass(frozen=True, eq=False)
class Experts:
    """Products of rows with weights (experts, n, k): the first input holds the rows' own inputs, the other experts."""

    weight: Tensor

    def __call__(self, x: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        """x (rows, choices k) and ids (rows, choices) give (rows, choices n)."""
        inputs, chosen = x.reshape(-1, self.weight.shape[2]), ids.reshape(-1).long()
        if x.is_cuda and len(inputs) <= FEW:
            return (self._picked(inputs, chosen).reshape(len(x), -1),)
        out = x.new_empty(len(inputs), self.weight.shape[1])
        for expert in chosen.unique().tolist():
            mine = (chosen == expert).nonzero()[:, 0]
            out[mine] = multiplied(inputs[mine], self.weight[expert]).to(x.dtype)
        return (out.reshape(len(x), -1),)

    def _picked(self, inputs: Tensor, chosen: Tensor) -> Tensor:
        """The same without asking what was chosen, as a CUDA graph must."""
        return (self.weight[chosen].to(inputs.dtype) @ inputs[..., None])[..., 0]


def choices(graph: Graph, tables: Tables) -> dict[fx.Node, Choice]:
    """The products with picked weights of a step graph."""
    found = ((node, _choice(node, tables)) for node in graph.calls(aten.bmm.default))
    return {node: choice for node, choice in found if choice is not None}


def picked(choices: dict[fx.Node, Choice]) -> set[fx.Node]:
    """The nodes that only pick weights for these products."""
    nodes: set[fx.Node] = set()
    for product in choices:
        todo = [arg for arg in product.all_input_nodes if is_call(arg, aten.index.Tensor, aten.transpose.int)]
        while todo:
            node = todo.pop()
            if is_call(node, aten.transpose.int):
                todo += node.all_input_nodes
            nodes.add(node)
    return {node for node in nodes if all(user in choices or user in nodes for user in node.users)}


def _choice(node: Any, tables: Tables) -> Choice | None:
    one, two = node.args
    for side, x, turned in ((one, two, False), (two, one, True)):
        source, swapped = (side.args[0], True) if is_call(side, aten.transpose.int) else (side, False)
        index: list[Any] = source.args[1] if is_call(source, aten.index.Tensor) else []
        fits = len(index) == 1 and len(shape(source)) == 3 and shape(x)[1 if turned else 2] == 1
        if fits and tables.kinds[source.args[0]] == CONSTANT and tables.kinds[index[0]] == LIVE:
            return Choice(source.args[0], index[0], x, turned != swapped)
    return None
