"""Zero mean along the features, and its dual: streams whose mean nobody reads.

Both rest on one rule a node: `flow(node, axis)` names the sources, each with an axis, whose centring along that axis is
the node's centring along this one. Parameters are sources like any other: a linear layer's output is centred by its
weight's and its bias's output axis. What has no rule loses zero mean, and counts as a reader that cannot be changed.

Source: Jiang, Gu, Zhu and Pan, Pre-RMSNorm and Pre-CRMSNorm Transformers, 2023, arXiv:2305.14858; the traversal
from a norm back to its writers: Guo et al., Enjoy Your Layer Normalization, 2026, arXiv:2605.14521, algorithm 1.
Differs: the readers are checked as well as the writers: each must be blind to the mean, or nothing is centred.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from taut.facts.contraction import also_read, contraction, line_along, name_of
from taut.facts.gains import Gain, gain_of
from taut.facts.moves import is_move, move
from taut.graph import Graph, is_getitem, shape
from taut.lift._match import is_call
from taut.ops.attention import attention
from taut.ops.embedding import embedding
from taut.ops.layer_norm import layer_norm
from taut.ops.linear import linear
from taut.ops.rms_norm import rms_norm
from taut.values import Affine, Centred, Filled, Scaled, Shifted, Value

aten = torch.ops.aten
Source = tuple[Any, int]
"""A node and one of its axes."""

SUMS = (aten.add.Tensor, aten.sub.Tensor)
PRODUCTS = (aten.mul.Tensor, aten.div.Tensor)
REDUCTIONS = (aten.sum.dim_IntList, aten.mean.dim)
TOKEN_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.mm.default)
ATTENTIONS = (attention, aten.scaled_dot_product_attention.default)
ZEROS = (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
SHAPE_ONLY = (
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.empty_like.default,
    aten.full_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_empty.default,
    aten.new_full.default,
    aten.sym_size.int,
)


@dataclass
class Stream:
    """A connected residual stream: `writers` are the parameters to centre, each along its axis, `norms` its readers.

    `refused` says in words why it cannot be centred.
    """

    writers: dict[str, int] = field(default_factory=dict)
    norms: list[fx.Node] = field(default_factory=list)
    nodes: dict[fx.Node, int] = field(default_factory=dict)
    refused: str | None = None


def zero_mean(graph: Graph) -> dict[fx.Node, int]:
    """The nodes whose mean along an axis, the one given, is zero whatever the input (the last, where it is several)."""
    return {node: max(axes) for node, axes in Means(graph).zero.items() if axes}


class Means:
    """Facts about means in one graph: `zero` has, per node, the axes along which its mean is zero."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.known: dict[fx.Node, bool] = {}
        self.flows: dict[Source, list[Source] | None] = {}
        self.zero: dict[fx.Node, frozenset[int]] = {}
        for node in graph.nodes:
            axes = frozenset(self._zero_axes(node))
            if axes:
                self.zero[node] = axes

    def is_zero(self, node: fx.Node, axis: int) -> bool:
        return axis in self.zero.get(node, ())

    def _zero_axes(self, node: fx.Node) -> Iterator[int]:
        ndim = len(shape(node))
        if node.op == "placeholder" and node.meta["kind"] == "parameter":
            yield from centred_axes(self.graph.values[node.meta["tensor"]], ndim)
        elif is_call(node, *ZEROS):
            yield from range(ndim)
        elif is_call(node, layer_norm, rms_norm):
            if self._norm_keeps(node):
                yield ndim - 1
        elif any(source in self.zero for source in _inputs(node)):
            for axis in range(ndim):
                sources = self.flow(node, axis)
                if sources and all(self.is_zero(*source) for source in sources):
                    yield axis

    def _norm_keeps(self, node: fx.Node) -> bool:
        """No gain per feature, and nothing added that has a mean; RMSNorm moreover makes no zero mean of its own."""
        args: Any = node.args
        x, gain, *rest = args
        if is_call(node, rms_norm) and not self.is_zero(x, len(shape(node)) - 1):
            return False
        bias = rest[0] if is_call(node, layer_norm) else None
        plain = bias is None or self.is_zero(bias, 0)
        return plain and (gain is None or constant_gain(self.graph, gain) is not None)

    def flow(self, node: fx.Node, axis: int) -> list[Source] | None:
        """The sources that centre a node along an axis if they are centred along theirs; None where there are none."""
        if (node, axis) not in self.flows:
            self.flows[node, axis] = self._flow(node, axis)
        return self.flows[node, axis]

    def _flow(self, node: fx.Node, axis: int) -> list[Source] | None:
        if node.op != "call_function" or not shape(node):
            return None
        args: Any = node.args
        last = len(shape(node)) - 1
        product = contraction(node, self.known)
        if product is not None:
            fits = axis == product.out_axis and not product.depthwise and not (node.target is linear and node.args[3:])
            written = [(product.weight, product.keep)] + ([(product.bias, 0)] if product.bias is not None else [])
            return written if fits else None
        if is_call(node, aten.embedding.default, embedding):
            return [(args[0] if node.target is not embedding else args[1], 1)] if axis == last else None
        if is_call(node, *ATTENTIONS):
            return [(args[2], last)] if axis == last else None
        if is_call(node, *TOKEN_PRODUCTS):
            right = len(shape(args[1])) - 1
            return [(args[1], right)] if axis == last and right > 0 else None
        if is_move(node):
            return _moved(node, axis)
        return _elementwise(node, axis) or _joined(node, axis)

    def stream(self, norm: fx.Node) -> Stream:
        """Everything that writes or reads the mean of a norm's input, with whatever hangs together with it."""
        found = Stream()
        todo: list[Source] = [(norm.args[0], len(shape(norm)) - 1)]
        while todo:
            node, axis = todo.pop()
            if self.is_zero(node, axis) or found.nodes.get(node) == axis:
                continue
            if node in found.nodes:
                found.refused = found.refused or f"two axes of {name_of(node)} would have to be centred"
                continue
            found.nodes[node] = axis
            todo += self._above(node, axis, found) + self._below(node, axis, found)
        found.norms.sort()
        return found

    def _above(self, node: fx.Node, axis: int, found: Stream) -> list[Source]:
        if node.op == "placeholder" and node.meta["kind"] == "parameter":
            found.writers[node.meta["tensor"]] = axis
            if node.meta.get("unread"):
                found.refused = found.refused or also_read(self.graph, node.meta["tensor"], [])
            return []
        sources = self.flow(node, axis)
        if sources is None:
            found.refused = found.refused or f"its input is written by {_said(node)}, which cannot be centred"
        return sources or []

    def _below(self, node: fx.Node, axis: int, found: Stream) -> list[Source]:
        reached: list[Source] = []
        for user in _users(node):
            if is_call(user, layer_norm) and axis == len(shape(node)) - 1 and self._is_only_input(user, node):
                found.norms.append(user)
                continue
            through = [b for b in range(len(shape(user))) if self._carries(user, b, node, axis)]
            if through:
                reached.append((user, through[0]))
            elif not is_call(user, *SHAPE_ONLY):
                found.refused = found.refused or self._also_read(node, user)
        return reached

    def _is_only_input(self, user: fx.Node, node: fx.Node) -> bool:
        return user.args[0] is node and _occurrences(user, node) == 1

    def _carries(self, user: fx.Node, to: int, node: fx.Node, axis: int) -> bool:
        """Whether a user is centred along `to` by centring the node, which it reads in no other way."""
        sources = self.flow(user, to) or []
        return (node, axis) in sources and sum(one is node for one, _ in sources) == _occurrences(user, node)

    def _also_read(self, node: fx.Node, user: fx.Node) -> str:
        if node.op == "placeholder":
            return also_read(self.graph, node.meta["tensor"], [user])
        if user.op == "output":
            return f"the mean of {_said(node)} is an output of the model"
        return f"the mean of {_said(node)} is also read by {name_of(user)}"


def centred_axes(value: Value, ndim: int) -> set[int]:
    """The axes along which a parameter's present value has mean zero."""
    match value:
        case Centred(x, axis):
            return {axis} | (centred_axes(x, ndim))
        case Filled(_, 0.0):
            return set(range(ndim))
        case Scaled(x, _, axis):
            return centred_axes(x, ndim) - {axis}
        case Affine(x, _, 0.0):
            return centred_axes(x, ndim)
        case Shifted(bias, weight, _, axis, keep):
            both = 0 in centred_axes(bias, 1) and keep in centred_axes(weight, axis + keep + 1)
            return {0} if both else set()
    return set()


def constant_gain(graph: Graph, node: Any) -> float | None:
    """The number that a gain or bias has become in every place, None where it has not."""
    vector = gain_of(graph, node)
    if isinstance(vector, Gain):
        value = graph.values[vector.parameter]
        if isinstance(value, Filled):
            return vector.scale * value.value + vector.offset
    return None


def _inputs(node: fx.Node) -> list[fx.Node]:
    """What a node reads; of one of several results of a movement, what the movement reads."""
    return [
        source for read in node.all_input_nodes for source in (read.all_input_nodes if is_getitem(node) else [read])
    ]


def _users(node: fx.Node) -> Iterator[fx.Node]:
    """Who reads a node; of a movement with several results, who takes one of them."""
    for user in node.users:
        if isinstance(user.meta.get("val"), list | tuple) and is_move(user) and user.args[0] is node:
            yield from user.users
        else:
            yield user


def _occurrences(user: fx.Node, node: fx.Node) -> int:
    seen: list[fx.Node] = []
    fx.map_arg((_before(user).args, _before(user).kwargs), seen.append)
    return sum(one is node for one in seen)


def _before(node: fx.Node) -> fx.Node:
    """The movement whose result a node takes; else the node."""
    source: Any = node.args[0] if is_getitem(node) else node
    return source


def _said(node: fx.Node) -> str:
    if node.op == "placeholder":
        return f"the {node.meta['kind']} {node.meta['tensor']}"
    return name_of(node)


def _moved(node: fx.Node, axis: int) -> list[Source] | None:
    """The axis of the source that a movement leaves whole, perhaps permuted, as this axis."""
    first = _before(node)
    source: Any = first.args[0]
    if not is_move(first) or not isinstance(source, fx.Node) or not shape(source):
        return None
    size = shape(source)
    for own in range(len(size)):
        if size[own] != shape(node)[axis]:
            continue
        index: Any = torch.arange(size[own], dtype=torch.int32).view([-1 if a == own else 1 for a in range(len(size))])
        index = move(first, index.expand(size))
        index = move(node, index) if index is not None and first is not node else index
        line = None if index is None or index.numel() == 0 else line_along(index, axis)
        if line is not None and torch.equal(line.sort().values, torch.arange(size[own], dtype=torch.int32)):
            return [(source, own)]
    return None


def _elementwise(node: fx.Node, axis: int) -> list[Source] | None:
    args: Any = node.args
    if is_call(node, aten.neg.default):
        return [(args[0], axis)]
    if is_call(node, *SUMS):
        return _aligned(node, args[:2], axis)
    if is_call(node, aten.where.self) and _same_along(node, args[0], axis):
        return _aligned(node, args[1:], axis)
    if is_call(node, aten.masked_fill.Scalar) and args[2] == 0 and _same_along(node, args[1], axis):
        return _aligned(node, args[:1], axis)
    if is_call(node, *PRODUCTS) and len(args) == 2:
        if _same_along(node, args[1], axis):
            return _aligned(node, args[:1], axis)
        if node.target is aten.mul.Tensor and _same_along(node, args[0], axis):
            return _aligned(node, args[1:], axis)
    return None


def _aligned(node: fx.Node, operands: Any, axis: int) -> list[Source] | None:
    """The operands' own axes, where none is a number or broadcast along the axis; adding zero changes nothing."""
    sources: list[Source] = []
    for operand in operands:
        if not isinstance(operand, fx.Node):
            if operand != 0:
                return None
            continue
        own = axis - len(shape(node)) + len(shape(operand))
        if own < 0 or shape(operand)[own] != shape(node)[axis]:
            return None
        sources.append((operand, own))
    return sources


def _same_along(node: fx.Node, factor: Any, axis: int) -> bool:
    """Whether an operand is one number for all places along an axis of the result."""
    if not isinstance(factor, fx.Node):
        return True
    own = axis - len(shape(node)) + len(shape(factor))
    return own < 0 or (shape(factor)[own] == 1 and shape(node)[axis] != 1)


def _joined(node: fx.Node, axis: int) -> list[Source] | None:
    """Concatenation of tokens, and sums over them."""
    args: Any = node.args
    ndim = len(shape(node))
    if is_call(node, aten.cat.default):
        along = (*args, 0)[1] % ndim
        return [(part, axis) for part in args[0]] if along != axis else None
    if is_call(node, aten.stack.default):
        along = (*args, 0)[1] % ndim
        return [(part, axis - (axis > along)) for part in args[0]] if along != axis else None
    if is_call(node, *REDUCTIONS) and args[1]:
        before = len(shape(args[0]))
        reduced = {a % before for a in args[1]}
        kept = list(range(before)) if (*args, False)[2] else [a for a in range(before) if a not in reduced]
        return [(args[0], kept[axis])] if kept[axis] not in reduced else None
    return None
