"""Rotary position embedding in its spellings: rotated halves, interleaved pairs, complex numbers, a part of the head.

What is turned is not matched but run: the movements and signs are applied to an array of indices.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from taut.facts.moves import is_move, move
from taut.graph import Graph, is_getitem, shape
from taut.lift._match import is_call, replace, through_casts
from taut.ops.rope import rope

ORDER = 2
aten = torch.ops.aten
SUMS = (aten.add.Tensor, aten.sub.Tensor)
JOINS = (aten.cat.default, aten.stack.default)


class Terms(NamedTuple):
    """first * cos + (or -) second * sin, all of them nodes."""

    first: Any
    cos: Any
    second: Any
    sin: Any


def lift(graph: Graph) -> None:
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        turned = _whole(graph, node) or _halves(graph, node) or _complex(graph, node)
        if turned is not None:
            _with_the_rest(graph, turned)


def _whole(graph: Graph, node: fx.Node) -> fx.Node | None:
    """x cos + turned(x) sin."""
    if not is_call(node, aten.add.Tensor):
        return None
    for terms in _terms(node):
        x = through_casts(terms.first)
        if shape(terms.first) != shape(node) or not isinstance(x, fx.Node):
            continue
        line = _last_axis(_signed(terms.second, x))
        for interleaved in (False, True):
            if line is not None and torch.equal(line, _turned(shape(x)[-1], interleaved)):
                return replace(graph, node, rope, (terms.first, terms.cos, terms.sin, interleaved))
    return None


def _halves(graph: Graph, node: fx.Node) -> fx.Node | None:
    """(a cos - b sin, b cos + a sin), one behind the other or in pairs; cos and sin have half the width."""
    joined = _joined(node)
    if joined is None or not is_call(joined[0], aten.sub.Tensor) or not is_call(joined[1], aten.add.Tensor):
        return None
    down, up, interleaved = joined
    for a, cos, b, sin in _terms(down):
        for other in _terms(up):
            if other == (b, cos, a, sin) and shape(a) == shape(down) and shape(cos)[-1] == shape(a)[-1]:
                x = _join(graph, node, a, b, interleaved)
                tables = [_join(graph, node, table, table, interleaved) for table in (cos, sin)]
                return replace(graph, node, rope, (x, *tables, interleaved))
    return None


def _complex(graph: Graph, node: fx.Node) -> fx.Node | None:
    """Pairs of features as complex numbers, multiplied by exp(i angle)."""
    product: Any = node.args[0] if is_move(node) and shape(node) else None
    product = product.args[0] if is_call(product, aten.view_as_real.default) else None
    if not is_call(product, aten.mul.Tensor) or shape(node) != (*shape(product)[:-1], 2 * shape(product)[-1]):
        return None
    for pairs, table in (product.args, product.args[::-1]):
        if (
            is_call(pairs, aten.view_as_complex.default)
            and isinstance(table, fx.Node)
            and shape(pairs) == shape(product)
        ):
            x = graph.insert(aten.flatten.using_ints, (pairs.args[0], -2), node)
            parts = graph.insert(aten.view_as_real.default, (table,), node)
            tables = [graph.insert(aten.select.int, (parts, -1, i), node) for i in (0, 1)]
            tables = [graph.insert(aten.repeat_interleave.self_int, (part, 2, -1), node) for part in tables]
            return replace(graph, node, rope, (x, *tables, True))
    return None


def _with_the_rest(graph: Graph, turned: fx.Node) -> None:
    """Take in a concatenation with the features behind, which pass unchanged."""
    whole: Any = next(iter(turned.users))
    if len(turned.users) != 1 or not is_call(whole, aten.cat.default) or len(whole.args[0]) != 2:
        return
    first, rest = whole.args[0]
    if first is not turned or not isinstance(rest, fx.Node) or not is_move(rest):
        return
    source: Any = rest.args[0]
    source = through_casts(source.args[0] if is_getitem(rest) else source)
    if shape(source) == shape(whole) and _are_the_whole(turned.args[0], rest, source):
        replace(graph, whole, rope, (source, *turned.args[1:]))


def _terms(node: fx.Node) -> list[Terms]:
    """The ways of reading a sum of two products as a Terms."""
    if node.kwargs or len(node.args) != 2:
        return []
    products: list[Any] = [through_casts(arg) for arg in node.args]
    if not all(is_call(p, aten.mul.Tensor) and all(isinstance(a, fx.Node) for a in p.args) for p in products):
        return []
    orders = [products, products[::-1]] if is_call(node, aten.add.Tensor) else [products]
    return [
        Terms(*first, *second)
        for one, two in orders
        for first in (one.args, one.args[::-1])
        for second in (two.args, two.args[::-1])
    ]


def _joined(node: Any) -> tuple[fx.Node, fx.Node, bool] | None:
    """The two halves that a node puts one behind the other (False) or in pairs (True)."""
    if is_call(node, aten.cat.default) and len(node.args[0]) == 2 and _is_last((*node.args, 0)[1], node):
        one, two = (through_casts(part) for part in node.args[0])
        return one, two, False
    stack: Any = node.args[0] if node.args else None
    if is_call(stack, aten.stack.default) and len(stack.args[0]) == 2 and _is_last((*stack.args, 0)[1], stack):
        one, two = (through_casts(part) for part in stack.args[0])
        if is_move(node) and shape(node) == (*shape(one)[:-1], 2 * shape(one)[-1]):
            return one, two, True
    return None


def _is_last(axis: int, node: fx.Node) -> bool:
    return axis % len(shape(node)) == len(shape(node)) - 1


def _join(graph: Graph, before: fx.Node, one: fx.Node, two: fx.Node, interleaved: bool) -> fx.Node:
    if interleaved:
        pairs = graph.insert(aten.stack.default, ([one, two], -1), before)
        return graph.insert(aten.flatten.using_ints, (pairs, -2), before)
    whole = None if one is two else _halves_of(one, two)
    return whole or graph.insert(aten.cat.default, ([one, two], -1), before)


def _halves_of(one: fx.Node, two: fx.Node) -> fx.Node | None:
    """The node whose halves these are."""
    source: Any = one.args[0] if is_move(one) else None
    source = source.args[0] if is_getitem(one) else source
    if not isinstance(source, fx.Node) or not shape(source):
        return None
    return source if _are_the_whole(one, two, through_casts(source)) else None


def _are_the_whole(one: Any, two: Any, source: fx.Node) -> bool:
    """Whether two values are the first and the other features of a node, in its order."""
    lines = [line for part in (one, two) if (line := _last_axis(_signed(part, source))) is not None]
    return len(lines) == 2 and torch.equal(torch.cat(lines), torch.arange(1, shape(source)[-1] + 1))


def _signed(node: Any, x: fx.Node) -> Any:
    """The features of x, counted from 1, that a node puts in each place, negative where negated; None if it differs."""
    node = through_casts(node)
    if node is x:
        return torch.arange(1, shape(x)[-1] + 1).expand(shape(x))
    if is_call(node, aten.neg.default):
        inner = _signed(node.args[0], x)
        return None if inner is None else -inner
    if is_call(node, *JOINS):
        parts = [_signed(part, x) for part in node.args[0]]
        if any(part is None or part.numel() == 0 for part in parts):
            return None
        return node.target(parts, *node.args[1:])
    if isinstance(node, fx.Node) and is_move(node):
        inner = _signed(node.args[0], x)
        return None if inner is None else move(node, inner)
    return None


def _last_axis(array: Any) -> Tensor | None:
    """The values along the last axis, if they are the same everywhere."""
    if not isinstance(array, Tensor) or array.ndim == 0:
        return None
    line = array[(0,) * (array.ndim - 1)]
    return line if bool((array == line).all()) else None


def _turned(size: int, interleaved: bool) -> Tensor:
    """The features that a rotation by a quarter turn puts in each place."""
    index = torch.arange(1, size + 1)
    if interleaved:
        return torch.stack((-index[1::2], index[::2]), -1).flatten()
    return torch.cat((-index[size // 2 :], index[: size // 2]))
