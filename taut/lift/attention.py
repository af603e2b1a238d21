"""Attention: torch's fused call, and the eager spelling with scale, softcap, masks and sinks; repeated heads go in."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace as with_
from typing import Any

import torch
from torch import fx

from taut.facts.moves import is_move, move
from taut.graph import Graph, is_getitem, shape
from taut.lift._match import after_casts, is_call, replace, through_casts
from taut.ops.attention import attention

ORDER = 3
aten = torch.ops.aten
SOFTMAX = (aten.softmax.int, aten._softmax.default)
HIDDEN = -1e30
"""What fills a hidden score must be so far below every score that adding the score does not change it."""


@dataclass(frozen=True)
class Scaled:
    """What is added times a number."""

    x: Added
    number: float


Added = fx.Node | tuple[fx.Node, float] | Scaled


@dataclass(frozen=True)
class Scores:
    """softcap(q k^T scale) + the sum of `added`, with numbers put in where a mask holds: (mask, number)."""

    q: Any
    k: Any
    scale: float = 1.0
    softcap: float | None = None
    added: tuple[Added, ...] = ()
    sinks: fx.Node | None = None


def lift(graph: Graph) -> None:
    for node in list(graph.nodes):
        if is_call(node, aten.scaled_dot_product_attention.default):
            _fused(graph, node)
        elif is_call(node, *SOFTMAX):
            _eager(graph, node)


def _fused(graph: Graph, node: fx.Node) -> None:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    q, k, v, mask = given["query"], given["key"], given["value"], given.get("attn_mask")
    causal, scale = given.get("is_causal", False), given.get("scale")
    if given.get("dropout_p", 0.0) != 0.0 or not _shapes_fit(q, k, v, given.get("enable_gqa", False)):
        return
    if causal and shape(q)[2] != shape(k)[2]:
        return
    _put(graph, node, q, k, v, mask, shape(q)[-1] ** -0.5 if scale is None else scale, causal)


def _eager(graph: Graph, node: fx.Node) -> None:
    axis: Any = node.args[1]
    scores = _scores(node.args[0]) if _is_last(axis, node) else None
    if scores is None:
        return
    weights = node if scores.sinks is None else _without_sink(node)
    product: Any = None if weights is None else _product_with_values(weights)
    if product is None or not _shapes_fit(scores.q, scores.k, product.args[1], False):
        return
    if shape(node)[:-1] != shape(scores.q)[:-1]:
        return  # what is added has a batch or heads of its own
    mask = _mask(graph, scores, product)
    _put(graph, product, scores.q, scores.k, product.args[1], mask, scores.scale, False, scores.softcap, scores.sinks)


def _put(graph: Graph, node: Any, q, k, v, mask, scale, causal, softcap=None, sinks=None) -> None:
    short = [part for part in (_before_repeat(whole, shape(q)[1]) for whole in (k, v)) if part is not None]
    if len({shape(part)[1] for part in short}) == 1 and len(short) == 2:
        k, v = short
    options = (softcap, None, sinks)
    while options and options[-1] is None:
        options = options[:-1]
    replace(graph, node, attention, (q, k, v, mask, scale, causal, *options))
    _erase(graph, node)


def _erase(graph: Graph, node: Any) -> None:
    """Remove what nobody reads any more; a dropout would stay behind for being random."""
    while isinstance(node, fx.Node) and node.op == "call_function" and not node.users:
        dead, node = node, node.args[0]
        graph.fx.erase_node(dead)


def _shapes_fit(q: fx.Node, k: fx.Node, v: fx.Node, grouped: bool) -> bool:
    sizes = [shape(part) for part in (q, k, v)]
    if any(len(size) != 4 for size in sizes):
        return False
    (batch, heads, _, width), (_, kv_heads, keys, _), _ = sizes
    enough = heads % kv_heads == 0 if grouped else kv_heads in (1, heads)
    return enough and sizes[1] == (batch, kv_heads, keys, width) and sizes[2][:3] == (batch, kv_heads, keys)


def _before_repeat(node: fx.Node, heads: int) -> fx.Node | None:
    """The keys or values before each head was repeated for its group of queries."""
    chain: list[fx.Node] = []
    source: Any = node
    while is_move(source) and not is_getitem(source):
        chain.append(source)
        source = source.args[0]
        size = shape(source)
        if len(size) == 4 and 0 < size[1] < heads and heads % size[1] == 0:
            return source if _repeats(chain, source, heads) else None
    return None


def _repeats(chain: list[fx.Node], source: fx.Node, heads: int) -> bool:
    size = shape(source)
    start = torch.arange(torch.Size(size).numel(), dtype=torch.int32).view(size)
    index: Any = start
    for node in reversed(chain):
        index = None if index is None else move(node, index)
    return index is not None and torch.equal(index, start.repeat_interleave(heads // size[1], 1))


def _scores(node: Any) -> Scores | None:
    """Read an expression as attention scores, from the outside in."""
    node = through_casts(node)
    if is_call(node, aten.matmul.default):
        return _product_of_q_and_k(node)
    if is_call(node, aten.mul.Tensor, aten.div.Tensor) and isinstance(node.args[1], int | float):
        return _scaled(node)
    if is_call(node, aten.add.Tensor) and not node.kwargs and all(isinstance(a, fx.Node) for a in node.args):
        for one, two in (node.args, node.args[::-1]):
            inner = _scores(one)
            if inner is not None:
                return with_(inner, added=(*inner.added, two)) if inner.sinks is None else None
    if is_call(node, aten.masked_fill.Scalar) and node.args[2] <= HIDDEN:
        inner = _scores(node.args[0])
        fill = (node.args[1], float(node.args[2]))
        return None if inner is None or inner.sinks is not None else with_(inner, added=(*inner.added, fill))
    if is_call(node, aten.maximum.default, aten.max.other):
        floors = [arg for arg in node.args if _is_hidden(arg)]
        return _scores(node.args[1] if floors[0] is node.args[0] else node.args[0]) if len(floors) == 1 else None
    if is_call(node, aten.sub.Tensor) and _is_maximum(node.args[1], node.args[0]):
        return _scores(node.args[0])
    if is_call(node, aten.cat.default):
        return _with_sink(node)
    return None


def _is_hidden(node: Any) -> bool:
    """A constant so low that a score is raised to it only where it is hidden."""
    return is_call(node, aten.full.default) and node.args[1] <= HIDDEN


def _product_of_q_and_k(node: Any) -> Scores | None:
    q, turned = node.args
    turned = through_casts(turned)
    if len(shape(q)) != 4 or not is_move(turned):
        return None
    axes = turned.args[1:]
    swapped = is_call(turned, aten.transpose.int) and {axis % 4 for axis in axes} == {2, 3}
    if swapped or is_call(turned, aten.mT.default):
        return Scores(q, turned.args[0])
    return None


def _scaled(node: Any) -> Scores | None:
    """A product with a number: the scale, or the end of a softcap."""
    number = float(node.args[1])
    factor = number if node.target is aten.mul.Tensor else 1.0 / number
    inside = through_casts(node.args[0])
    if is_call(inside, aten.tanh.default):
        inner = _scores(inside.args[0])
        if inner is None or inner.softcap is not None or inner.added or inner.sinks is not None:
            return None
        if node.target is not aten.mul.Tensor:
            return None
        return with_(inner, scale=inner.scale * number, softcap=number)
    inner = _scores(inside)
    if inner is None or inner.softcap is not None or inner.sinks is not None:
        return None
    return with_(inner, scale=inner.scale * factor, added=tuple(Scaled(part, factor) for part in inner.added))


def _is_maximum(node: Any, of: fx.Node) -> bool:
    """The largest value along the last axis, which softmax does not see."""
    if is_getitem(node) and node.args[1] == 0 and is_call(node.args[0], aten.max.dim):
        source, axis = node.args[0].args[:2]
        return source is of and _is_last(axis, of) and node.args[0].args[2:] == (True,)
    return is_call(node, aten.amax.default) and node.args[0] is of and node.args[1:] == ([-1], True)


def _with_sink(node: Any) -> Scores | None:
    """One more score a head, the same for every query."""
    parts = node.args[0]
    if len(parts) != 2 or not _is_last((*node.args, 0)[1], node) or shape(parts[1])[-1] != 1:
        return None
    inner, source, chain = _scores(parts[0]), parts[1], []
    while is_move(source) and len(shape(source)) != 1:
        chain.append(source)
        source = source.args[0]
    if inner is None or inner.sinks is not None or len(shape(source)) != 1:
        return None
    index: Any = torch.arange(shape(source)[0])
    for move_node in reversed(chain):
        index = None if index is None else move(move_node, index)
    heads = torch.arange(shape(inner.q)[1])[:, None, None]
    if index is None or index.ndim != 4 or not bool((index == heads).all()):
        return None
    return with_(inner, sinks=source)


def _without_sink(node: fx.Node) -> fx.Node | None:
    """The weights with the sink's cut off."""
    users: list[Any] = list(after_casts(node).users)
    if len(users) == 1 and is_call(users[0], aten.slice.Tensor) and shape(users[0])[-1] == shape(node)[-1] - 1:
        return users[0] if users[0].args[2] == 0 and (*users[0].args, 1)[4] == 1 else None
    return None


def _product_with_values(weights: fx.Node) -> fx.Node | None:
    """The product that alone reads the attention weights."""
    weights = after_casts(weights)
    users = list(weights.users)
    if len(users) == 1 and is_call(users[0], aten.matmul.default) and users[0].args[0] is weights:
        return users[0]
    return None


def _mask(graph: Graph, scores: Scores, before: fx.Node) -> fx.Node | None:
    """One tensor of numbers to add. What is put in where a mask holds is put in there, over what was added before."""
    total: fx.Node | None = None
    for part in scores.added:
        total = _with(graph, total, part, before)
    return total


def _with(graph: Graph, total: fx.Node | None, part: Added, before: fx.Node) -> fx.Node:
    """A mask and one part more."""
    if isinstance(part, tuple):
        fill = aten.where.Scalar if total is None else aten.where.ScalarSelf
        return graph.insert(fill, (*part, 0.0 if total is None else total), before)
    if isinstance(part, Scaled):
        part = graph.insert(aten.mul.Tensor, (_with(graph, None, part.x, before), part.number), before)
    return part if total is None else graph.insert(aten.add.Tensor, (total, part), before)


def _is_last(axis: int, node: fx.Node) -> bool:
    return axis % len(shape(node)) == len(shape(node)) - 1
