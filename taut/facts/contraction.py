"""Contractions: products of an activation with a parameter, whatever the spelling, and where the parameter lies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from taut.facts.moves import is_move, move, without_repeats
from taut.graph import Graph, shape
from taut.lift._match import is_call, is_constant
from taut.ops.expert_linear import expert_linear
from taut.ops.linear import linear

aten = torch.ops.aten
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


@dataclass(frozen=True)
class Contraction:
    """`node` contracts `x_axis` of x with `axis` of weight; its result's features, `out_axis`, run along `keep`.

    `depthwise` means nothing is summed over features: axis and keep are the same axis.
    """

    node: fx.Node
    x: fx.Node
    x_axis: int
    weight: fx.Node
    axis: int
    keep: int
    out_axis: int
    bias: fx.Node | None = None
    padded: bool = False
    depthwise: bool = False


def contraction(node: fx.Node, known: dict[fx.Node, bool]) -> Contraction | None:
    """The product that a node computes, if its weight is made of parameters alone."""
    if node.op != "call_function":
        return None
    args: Any = (*node.args, None)
    if node.target is linear and is_constant(args[1], known):
        x, weight, bias = args[:3]
        if bias is None or is_constant(bias, known):
            return Contraction(node, x, len(shape(x)) - 1, weight, 1, 0, len(shape(node)) - 1, bias)
    if node.target is expert_linear and is_constant(args[1], known):
        return Contraction(node, args[0], 1, args[1], 1, 2, 1)
    if node.target in (aten.bmm.default, aten.matmul.default) and is_constant(args[1], known):
        x, weight = args[:2]
        n = len(shape(weight))
        if n >= 3 and not is_constant(x, known):
            return Contraction(node, x, len(shape(x)) - 1, weight, n - 2, n - 1, len(shape(node)) - 1)
    if node.target in CONVOLUTIONS and is_constant(args[1], known):
        return _convolution(node, known)
    return None


def _convolution(node: fx.Node, known: dict[fx.Node, bool]) -> Contraction | None:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    x, weight, bias, groups = given["input"], given["weight"], given.get("bias"), given.get("groups", 1)
    if bias is not None and not is_constant(bias, known):
        return None
    window = shape(weight)[2:]
    channel = len(shape(x)) - len(window) - 1
    padding = given.get("padding", 0)
    padded = any(padding) if isinstance(padding, list | tuple) else padding not in (0, "valid")
    if groups == 1:
        return Contraction(node, x, channel, weight, 1, 0, channel, bias, padded)
    if shape(weight)[1] == 1 and shape(weight)[0] == groups:
        return Contraction(node, x, channel, weight, 0, 0, channel, bias, padded, depthwise=True)
    return None


@dataclass(frozen=True)
class Place:
    """Where an axis of a weight lies in the checkpoint: position j of the axis is `order[j]` of the parameter's.

    `size` is that of the parameter's axis.
    """

    parameter: str
    axis: int
    order: tuple[int, ...] | None
    size: int

    def along(self, values: tuple[int, ...]) -> tuple[int, ...]:
        """Per position of the parameter's own axis what `values` says per position of the weight's; -1 unsaid."""
        if self.order is None:
            return values
        spread = [-1] * self.size
        for position, value in zip(self.order, values, strict=True):
            spread[position] = value
        return tuple(spread)


def place(graph: Graph, node: Any, axis: int, *, multiplied: bool = False) -> Place | str:
    """The parameter and its axis that an axis of a weight expression is; else the reason why there is none.

    Where the weight is the parameter times a number, there is none either, but for a caller to whom a `multiplied`
    one is as good.
    """
    chain: list[fx.Node] = []
    while not (isinstance(node, fx.Node) and node.op == "placeholder"):
        if not is_move(node) and not (multiplied and _times_number(node)):
            return f"its weight is computed by {name_of(node)}"
        chain.append(node)
        node = node.args[0]
    parameter = node.meta["tensor"]
    if not chain:
        return Place(parameter, axis, None, shape(node)[axis])
    for own in range(len(shape(node))):
        order = _order(node, list(reversed(chain)), own, axis)
        if order is not None:
            size = shape(node)[own]
            return Place(parameter, own, None if order == tuple(range(size)) else order, size)
    return "the input axis of its weight is not one axis of a parameter"


def _times_number(node: fx.Node) -> bool:
    return is_call(node, aten.mul.Tensor, aten.div.Tensor) and not isinstance(node.args[1], fx.Node)


def _order(leaf: fx.Node, chain: list[fx.Node], own: int, axis: int) -> tuple[int, ...] | None:
    """Follow the positions along one axis of the parameter: where they vary along `axis` alone, they are its order."""
    size = shape(leaf)
    array: Any = torch.arange(size[own], dtype=torch.int32)
    array = array.view([-1 if a == own else 1 for a in range(len(size))]).expand(size)
    for node in chain:
        array = array if _times_number(node) else move(node, array)
        if array is None:
            return None
    line = line_along(array, axis)
    if line is None or len(set(line.tolist())) != len(line):
        return None
    return tuple(line.tolist())


def line_along(array: Tensor, axis: int) -> Tensor | None:
    """The values along an axis, if they are the same at every position of the others."""
    if not array.numel():
        return None
    line = array
    for other in range(array.ndim):
        if other != axis % array.ndim:
            line = line.narrow(other, 0, 1)
    return line.flatten() if bool((without_repeats(array) == without_repeats(line)).all()) else None


def name_of(node: Any) -> str:
    """An op's name for people."""
    if not isinstance(node, fx.Node):
        return "a number"
    if node.op != "call_function":
        return node.meta.get("tensor", node.op)
    target: Any = node.target
    name = getattr(target, "name", None)
    plain = getattr(target, "__name__", target)
    text = name if isinstance(name, str) else str(getattr(target, "overloadpacket", plain))
    text = text.removeprefix("aten.").removeprefix("aten::").split(".")[0]
    return f"{text} in {node.meta['where']}" if node.meta.get("where") else text


def uses(graph: Graph) -> dict[str, set[fx.Node]]:
    """For every parameter the nodes that read it, past anything computed from parameters alone.

    Whoever reads it under a name that no node reads is not known, and cannot be changed: the graph's output stands
    for them.
    """
    known: dict[fx.Node, bool] = {}
    found: dict[str, set[fx.Node]] = {}
    for name, leaf in graph.placeholders("parameter").items():
        found[name], todo = {graph.output} if leaf.meta.get("unread") else set(), [leaf]
        while todo:
            for user in todo.pop().users:
                if user.op == "call_function" and is_constant(user, known):
                    todo.append(user)
                else:
                    found[name].add(user)
    return found


def also_read(graph: Graph, parameter: str, others: Iterable[fx.Node]) -> str:
    """Why a parameter cannot be rewritten that other nodes read too."""
    unread = graph.placeholders("parameter")[parameter].meta.get("unread")
    if unread:
        return f"{parameter} is also known as {', '.join(unread)}, which nothing that was traced reads"
    tied = [name for name in graph.names_of(parameter) if name != parameter]
    also = f" (tied to {', '.join(tied)})" if tied else ""
    return f"{parameter}{also} is also read by {name_of(min(others, key=lambda n: n.name))}"


def times_read(node: fx.Node, parameter: str) -> int:
    """How many of a node's arguments are computed from a parameter, among those computed from parameters alone."""
    arguments: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), arguments.append)
    known: dict[fx.Node, bool] = {}
    return sum(is_constant(argument, known) and parameter in _parameters(argument) for argument in arguments)


def _parameters(node: fx.Node) -> set[str]:
    """The names of the parameters that an expression of parameters alone is computed from."""
    if node.op == "placeholder":
        return {node.meta["tensor"]}
    return set().union(*(_parameters(source) for source in node.all_input_nodes))
