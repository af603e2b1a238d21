"""Readers: who consumes a norm's output, through which parameters, and which of its features each weight meets.

Every element of the norm's output carries the index of the gain that multiplies it. Movements carry indices along;
what commutes with a gain per feature lets them pass; a product with a parameter is a reader; anything else refuses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from taut.facts.contraction import Contraction, contraction, line_along, name_of
from taut.facts.moves import constant_along, is_move, move
from taut.graph import Graph, shape
from taut.lift._match import is_call
from taut.ops.glu import glu

aten = torch.ops.aten
NOBODY = -1

JOINS = (aten.cat.default, aten.stack.default)
PRODUCTS = (aten.mul.Tensor, aten.div.Tensor)
SUMS = (aten.sum.dim_IntList, aten.mean.dim)
TOKEN_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.mm.default)


@dataclass(frozen=True)
class Reader:
    """A product that reads the norm: position j of its contracted axis meets gain element `features[j]`.

    `gain_only` says that on the way the value was multiplied by something, which a bias does not survive.
    """

    contraction: Contraction
    features: tuple[int, ...]
    gain_only: bool


@dataclass(frozen=True)
class Carried:
    """The gain index of every element of a node's value, NOBODY where it carries none."""

    index: Any
    gain_only: bool = False

    def moved(self, index: Any) -> Carried:
        return Carried(index, self.gain_only)


def readers(graph: Graph, norm: fx.Node, gain_shape: tuple[int, ...]) -> list[Reader] | str:
    """Every reader of a norm, or in words why one of them cannot take the gain."""
    size = int(torch.Size(gain_shape).numel())
    start = torch.arange(size, dtype=torch.int32).view(gain_shape).expand(shape(norm))
    carried: dict[fx.Node, Carried] = {norm: Carried(start)}
    found: list[Reader] = []
    known: dict[fx.Node, bool] = {}
    todo = set(norm.users)
    for node in graph.nodes:
        if node not in todo:
            continue
        if node.op == "output":
            return "it is an output of the model"
        product = contraction(node, known)
        if product is not None and product.x in carried and not _carries(product, carried):
            read = _read(product, carried[product.x])
            if isinstance(read, str):
                return read
            found.append(read)
            continue
        passed = _pass(node, carried)
        if isinstance(passed, str):
            return passed
        if passed is not None:
            carried[node] = passed
            todo |= set(node.users)
    return found or "nothing reads it"


def _carries(product: Contraction, carried: dict[fx.Node, Carried]) -> bool:
    """Whether anything but x brings the norm's output into a product."""
    return any(arg in carried for arg in product.node.all_input_nodes if arg is not product.x)


def _read(product: Contraction, carried: Carried) -> Reader | str:
    line = line_along(carried.index, product.x_axis)
    if line is None or bool((line == NOBODY).any()):
        return f"{name_of(product.node)} reads it mixed with other values"
    return Reader(product, tuple(line.tolist()), carried.gain_only)


def _pass(node: fx.Node, carried: dict[fx.Node, Carried]) -> Carried | str | None:
    """What a node that is not a reader makes of the gain indices; a reason where it breaks them."""
    sources = [arg for arg in node.all_input_nodes if arg in carried]
    first = carried[sources[0]]
    refusal = f"it is read by {name_of(node)}"
    if len(sources) > 1 and node.target not in JOINS:
        return refusal
    if is_move(node):
        if node.args[0] is not sources[0]:
            return refusal
        index = move(node, first.index)
        return refusal if index is None else first.moved(index)
    if is_call(node, *JOINS):
        return _join(node, carried)
    if is_call(node, *PRODUCTS):
        return _product(node, sources[0], first, refusal)
    if is_call(node, glu) and node.args[1] is sources[0]:
        return Carried(first.index, gain_only=True)
    if is_call(node, aten.masked_fill.Scalar) and node.args[0] is sources[0] and node.args[2] == 0:
        return Carried(torch.broadcast_to(first.index, shape(node)), gain_only=True)
    if is_call(node, *SUMS):
        return _sum(node, first, refusal)
    if is_call(node, *TOKEN_PRODUCTS) and node.args[1] is sources[0]:
        index = first.index
        weights: Any = node.args[0]
        if index.ndim < 2 or len(shape(weights)) < 2 or not constant_along(index, -2):
            return refusal
        return Carried(index.narrow(-2, 0, 1).expand(shape(node)), gain_only=True)
    return refusal


def _join(node: fx.Node, carried: dict[fx.Node, Carried]) -> Carried:
    parts: Any = node.args[0]
    nobody = {part: torch.full(shape(part), NOBODY, dtype=torch.int32) for part in parts if part not in carried}
    indices = [carried[part].index if part in carried else nobody[part] for part in parts]
    gain_only = any(carried[part].gain_only for part in parts if part in carried)
    target: Any = node.target
    return Carried(target(indices, *node.args[1:], **node.kwargs), gain_only)


def _product(node: fx.Node, source: fx.Node, first: Carried, refusal: str) -> Carried | str:
    """A gain commutes with elementwise products; not with being the divisor."""
    if is_call(node, aten.div.Tensor) and node.args[0] is not source:
        return refusal
    if len(node.args) != 2 or node.args[0] is node.args[1] or shape(node) != shape(source):
        return refusal
    return Carried(first.index, gain_only=True)


def _sum(node: fx.Node, first: Carried, refusal: str) -> Carried | str:
    axes: Any = node.args[1] or list(range(first.index.ndim))
    if not all(constant_along(first.index, axis) for axis in axes):
        return refusal
    keep = len(node.args) > 2 and bool(node.args[2])
    index: Tensor = first.index.amax(axes, keepdim=keep)
    return Carried(index, first.gain_only or is_call(node, aten.sum.dim_IntList))
