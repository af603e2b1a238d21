"""Take the gain of a query or key norm out of every head: into the rotary tables, or from the query into the key.

    rope(g x)  =  x (cos g)  +  turned(x) (sin turned(g))          turned swaps the features of each pair
    (g_q x) . (g_k y)  =  x . (g_q g_k y)                           where nothing is rotated

The tables have one row a position and the norm one a head and position, so that a gain that all heads share is
multiplied once. Features behind a partial rotation are not in the tables: the query's gain on them goes to the key.
Without any rotation the query's norm gets a gain of one, which the model's own class can hold.

Source: Graef, Makraduli, Wasielewski and Clapp, FlashNorm: fast normalization for transformers, 2024,
arXiv:2407.09577, the sections on RoPE and on norms of queries and keys.
Differs: the turned gain for both layouts of pairs, partial rotation, and the refusal of gains that differ by head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from taut.facts.contraction import line_along, name_of, uses
from taut.facts.degree import NORMS
from taut.facts.gains import Gain, gain_of
from taut.facts.moves import is_move, move
from taut.graph import Graph, shape
from taut.lift._match import is_call
from taut.ops.attention import attention
from taut.ops.rms_norm import rms_norm
from taut.ops.rope import rope
from taut.rewrite import STOCK, Exactness, Form, Rewrite, Site
from taut.values import Affine, Filled, Pick, Scaled, Stacked, Value

aten = torch.ops.aten
SCALINGS = (aten.mul.Tensor, aten.div.Tensor)
QUERY, KEY = 0, 1


@dataclass
class End:
    """Where a norm's output is turned or compared: `node` reads it, `features` says which gain each feature has."""

    node: fx.Node
    argument: int
    features: tuple[int, ...] | None


@dataclass
class Fold:
    """One norm: the rotations whose tables take its gain, and the parameters that become something else."""

    norm: fx.Node
    ropes: list[fx.Node] = field(default_factory=list)
    becomes: dict[str, Value] = field(default_factory=dict)


def sites(graph: Graph, form: Form) -> list[Site]:
    used = uses(graph)
    found = []
    for norm in graph.calls(*NORMS):
        ends = _ends(norm)
        if any(_is_query_or_key(end) for end in ends):
            fold = _fold(graph, norm, ends, used, form)
            where = norm.meta["where"] or norm.name
            written = () if isinstance(fold, str) else tuple(fold.becomes)
            found.append(Site(where, fold) if isinstance(fold, str) else Site(where, writes=written, detail=fold))
    return found


def _is_query_or_key(end: End) -> bool:
    return is_call(end.node, rope) or (is_call(end.node, attention) and end.argument in (QUERY, KEY))


def _ends(norm: fx.Node) -> list[End]:
    """The readers of a norm behind movements and multiplication by numbers."""
    size = shape(norm)
    start = torch.arange(size[-1], dtype=torch.int32).expand(size)
    return list(_follow(norm, start))


def _follow(node: fx.Node, index: Any) -> Iterator[End]:
    for user in node.users:
        if is_move(user) and user.args[0] is node and isinstance(user.meta["val"], torch.Tensor):
            moved = None if index is None else move(user, index)
            yield from _follow(user, moved)
        elif is_call(user, *SCALINGS) and user.args[0] is node and not isinstance(user.args[1], fx.Node):
            yield from _follow(user, index)
        else:
            line = None if index is None or user.op == "output" else line_along(index, -1)
            arguments = [i for i, arg in enumerate(user.args) if arg is node]
            features = None if line is None else tuple(line.tolist())
            yield End(user, arguments[0] if len(arguments) == 1 else -1, features)


def _fold(graph: Graph, norm: fx.Node, ends: list[End], used: dict[str, set[fx.Node]], form: Form) -> Fold | str:
    gain = _own_gain(graph, norm)
    if isinstance(gain, str):
        return gain
    for end in ends:
        if not _is_query_or_key(end) or end.argument < 0:
            return "it is an output of the model" if end.node.op == "output" else f"it is read by {name_of(end.node)}"
        if end.features is None or len(end.features) != gain.size:
            return "its gain differs from head to head, and the tables are the same for all heads"
        if end.features != tuple(range(gain.size)):
            return "its features are put in another order before they are rotated"
    turned = [end.node for end in ends if is_call(end.node, rope)]
    if turned and len(turned) < len(ends):
        return "it is read both rotated and not"
    if not turned:
        return _into_key(graph, norm, gain, [end.node for end in ends], ends[0].argument, used)
    if form == STOCK:
        return "its gain goes into the rotary tables, for which the model's own class has no place: use --form taut"
    width = {_rotated(node) for node in turned}
    if width == {gain.size}:
        return Fold(norm, turned)
    return _partly(graph, norm, gain, turned, used) if len(width) == 1 else "its rotations have different widths"


def _rotated(node: Any) -> int:
    """How many features a rotation turns."""
    return shape(node.args[1])[-1]


def _own_gain(graph: Graph, norm: fx.Node) -> Gain | str:
    gain, *rest = norm.args[1:]
    if gain is None:
        return "it has no gain"
    if norm.target is not rms_norm and rest[0] is not None:
        return "it adds a bias, which would have to be rotated too"
    return gain_of(graph, gain)


def _into_key(
    graph: Graph, norm: fx.Node, gain: Gain, products: list[fx.Node], argument: int, used: dict[str, set[fx.Node]]
) -> Fold | str:
    """The query's gain times the key's, where nothing is rotated."""
    if argument == KEY:
        return "a product with queries needs one gain: this is the one that stays"
    if graph.values[gain.parameter] == gain.neutral(1.0):
        return "already folded: its gain is one"
    taken = _taken_by_key(graph, gain, products, 0, used)
    if isinstance(taken, str):
        return taken
    reason = _shared(graph, gain.parameter, {norm}, used)
    return reason or Fold(norm, [], taken | {gain.parameter: gain.neutral(1.0)})


def _partly(
    graph: Graph, norm: fx.Node, gain: Gain, turned: list[fx.Node], used: dict[str, set[fx.Node]]
) -> Fold | str:
    """The tables take the rotated features' gain, the key's norm that of the others."""
    rotated = _rotated(turned[0])
    ends = [end for node in turned for end in _follow(node, None)]
    if any(not is_call(end.node, attention) or end.argument not in (QUERY, KEY) for end in ends):
        return f"features from {rotated} on are not rotated, and are read by more than a product with keys"
    if any(end.argument == KEY for end in ends):
        return f"features from {rotated} on are not rotated and keep its gain"
    taken = _taken_by_key(graph, gain, [end.node for end in ends], rotated, used)
    return taken if isinstance(taken, str) else Fold(norm, turned, taken)


def _taken_by_key(
    graph: Graph, gain: Gain, products: list[fx.Node], rotated: int, used: dict[str, set[fx.Node]]
) -> dict[str, Value] | str:
    """What the key norm's parameter becomes when it takes the query's gain on the features from `rotated` on."""
    keys = {_normed_key(product.args[KEY], rotated) for product in products}
    if len(keys) != 1 or None in keys:
        return "no norm of the keys could take its gain"
    key: Any = keys.pop()
    own = _own_gain(graph, key)
    if isinstance(own, str):
        return f"the keys' norm cannot take its gain: {own}"
    reached = {end.node for end in _ends(key)}
    reached = {end.node for node in reached for end in _follow(node, None)} if rotated else reached
    if own.size != gain.size or reached != set(products):
        return "the keys' norm is also read elsewhere, or by heads of another width"
    value: Value = Scaled(own.value(graph), _from(gain.value(graph), rotated, gain.size), 0)
    if (own.scale, own.offset) != (1.0, 0.0):
        value = Affine(value, 1.0 / own.scale, -own.offset / own.scale)
    return _shared(graph, own.parameter, {key}, used) or {own.parameter: value}


def _from(gain: Value, first: int, size: int) -> Value:
    """The gain from a feature on, one before it."""
    if first == 0:
        return Pick(gain)
    return Stacked((Filled((first,), 1.0), Pick(gain, tuple(range(first, size)))), (first, size - first))


def _normed_key(node: Any, rotated: int) -> fx.Node | None:
    """The norm that a product's keys come from, behind movements, numbers and (where features are) the rotation."""
    while not is_call(node, *NORMS):
        scaled = is_call(node, *SCALINGS) and not isinstance(node.args[1], fx.Node)
        turned = rotated > 0 and is_call(node, rope) and _rotated(node) == rotated
        if not isinstance(node, fx.Node) or not (is_move(node) or scaled or turned):
            return None
        node = node.args[0]
    return node


def _shared(graph: Graph, parameter: str, readers: set[fx.Node], used: dict[str, set[fx.Node]]) -> str | None:
    others = used[parameter] - readers
    if others:
        return f"{parameter} is also read by {name_of(min(others, key=lambda n: n.name))}"
    return graph.unwritable(parameter, (0,)) if graph.unwritable is not None else None


def change(graph: Graph, chosen: list[Site]) -> None:
    for site in chosen:
        fold: Fold = site.detail
        graph.values.update(fold.becomes)
        if fold.ropes:
            _into_tables(graph, fold)


def _into_tables(graph: Graph, fold: Fold) -> None:
    """Multiply the tables of every rotation in float32 or wider, and leave the norm without a gain."""
    gain: Any = fold.norm.args[1]
    for node in fold.ropes:
        args: Any = node.args
        x, cos, sin, *rest = args
        interleaved = bool((*rest, node.kwargs.get("interleaved", False))[0])
        own = _wide(graph, gain, node)
        if shape(cos)[-1] < shape(own)[-1]:
            own = graph.insert(aten.slice.Tensor, (own, 0, 0, shape(cos)[-1]), node)
        tables = ((cos, own), (sin, _partners(graph, own, interleaved, node)))
        new = [graph.insert(aten.mul.Tensor, (_wide(graph, table, node), by), node) for table, by in tables]
        node.args = (x, *new, *rest)
    fold.norm.args = (fold.norm.args[0], None, *fold.norm.args[2:])


def _partners(graph: Graph, gain: fx.Node, interleaved: bool, before: fx.Node) -> fx.Node:
    """Each feature's gain in the place of the feature that it is rotated with."""
    size = shape(gain)[0]
    if not interleaved:
        return graph.insert(aten.roll.default, (gain, [size // 2]), before)
    pairs = graph.insert(aten.reshape.default, (gain, [size // 2, 2]), before)
    swapped = graph.insert(aten.flip.default, (pairs, [-1]), before)
    return graph.insert(aten.reshape.default, (swapped, [size]), before)


def _wide(graph: Graph, node: fx.Node, before: fx.Node) -> fx.Node:
    dtype = torch.promote_types(node.meta["val"].dtype, torch.float32)
    if node.meta["val"].dtype == dtype:
        return node
    return graph.insert(aten._to_copy.default, (node,), before, {"dtype": dtype})


fold_qk_norm_gain = Rewrite(
    "fold_qk_norm_gain",
    Exactness.ALGEBRAIC,
    sites,
    change,
    asked=True,
    order=2,
    absent="no norm stands on queries or keys",
)
