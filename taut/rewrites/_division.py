"""What the rewrites of a norm's division share: the norm without it, and its scalar carried to where it is needed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from taut.facts.degree import NORMS, Absorber, Edge, Reach, reach
from taut.facts.gains import gain_of
from taut.graph import Graph
from taut.ops.layer_norm import layer_norm
from taut.rewrite import Site

aten = torch.ops.aten


def norms(graph: Graph) -> list[tuple[str, fx.Node]]:
    """Every norm with its module path."""
    return [(norm.meta["where"] or norm.name, norm) for norm in graph.calls(*NORMS)]


def undividable(graph: Graph, norm: fx.Node) -> str | None:
    """Why a norm's division cannot be told from the rest of it."""
    if norm.meta["val"].dtype == torch.float16:
        return "float16 has no room for values that are not divided yet"
    bias = _parts(norm)[1]
    if bias is not None and not _is(graph, bias, 0.0):
        return "it adds a bias: fold its bias first"
    return None


def _parts(norm: fx.Node) -> tuple[Any, Any, Any]:
    """A norm's gain, bias and epsilon."""
    names = ("gain", "bias", "eps") if norm.target is layer_norm else ("gain", "eps")
    defaults = {"gain": None, "bias": None, "eps": 1e-5 if norm.target is layer_norm else 1e-6}
    given = defaults | dict(zip(names, norm.args[1:], strict=False)) | dict(norm.kwargs)
    return given["gain"], given["bias"], given["eps"]


def epsilon(norm: fx.Node) -> Any:
    """A norm's epsilon: a number, or the node that computes it per token."""
    return _parts(norm)[2]


def _is(graph: Graph, node: Any, value: float) -> bool:
    """Whether a gain or a bias has been folded to the vector that does nothing."""
    part = gain_of(graph, node)
    return not isinstance(part, str) and graph.values[part.parameter] == part.neutral(value)


def divided(graph: Graph, norm: fx.Node) -> fx.Node:
    """What a norm divides by its root mean square: its input, in float32 or wider and centred for LayerNorm."""
    x: Any = norm.args[0]
    if norm.target is not layer_norm:
        return x
    x = _cast(graph, x, torch.promote_types(norm.meta["val"].dtype, torch.float32), norm)
    return graph.insert(aten.sub.Tensor, (x, graph.insert(aten.mean.dim, (x, [-1], True), norm)), norm)


def leave_out(graph: Graph, norm: fx.Node, value: fx.Node) -> None:
    """Replace a norm by what it divides, times its gain; a gain or bias that does nothing goes, with its parameter."""
    gain, bias, _ = _parts(norm)
    if gain is not None and not _is(graph, gain, 1.0):
        value = graph.insert(aten.mul.Tensor, (value, gain), norm)
    norm.replace_all_uses_with(_cast(graph, value, norm.meta["val"].dtype, norm))
    graph.fx.erase_node(norm)
    for part in (gain, bias):
        if part is not None:
            _drop_unread(graph, part)


def _cast(graph: Graph, x: fx.Node, dtype: torch.dtype, before: fx.Node) -> fx.Node:
    return x if x.meta["val"].dtype == dtype else graph.insert(aten._to_copy.default, (x,), before, {"dtype": dtype})


def _drop_unread(graph: Graph, node: fx.Node) -> None:
    """Erase a node that nobody reads, and the parameters that only it read."""
    if node.users:
        return
    sources = node.all_input_nodes
    if node.op == "placeholder":
        if node.meta["kind"] != "parameter":
            return
        del graph.values[node.meta["tensor"]]
        graph.written.pop(node.meta["tensor"], None)
    graph.fx.erase_node(node)
    for source in sources:
        _drop_unread(graph, source)


class Carrier:
    """Carries the scalar of a norm, `root`, along everything that carries its degree; nodes are made when asked for."""

    def __init__(self, graph: Graph, found: Reach, root: fx.Node) -> None:
        self.graph, self.found = graph, found
        self.made: dict[fx.Node, fx.Node] = {found.norm: root}

    def at(self, node: fx.Node) -> fx.Node:
        """The scalar of a node's value, which broadcasts to it."""
        if node not in self.made:
            step = self.found.scaled[node].step
            assert step is not None
            sources: list[Any] = [self.at(source) for source in step.sources]
            scalar: Any = sources[0] if len(sources) == 1 else sources
            for target, args, kwargs in step.calls:
                scalar = self.graph.insert(target, (scalar, *args), node, kwargs)
            self.made[node] = scalar
        return self.made[node]

    def power(self, node: fx.Node, exponent: int, before: fx.Node) -> fx.Node:
        scalar = self.at(node)
        return scalar if exponent == 1 else self.graph.insert(aten.pow.Tensor_Scalar, (scalar, exponent), before)


def put_in(carrier: Carrier, edges: Iterable[Edge]) -> None:
    """Multiply by the scalar at every edge: once for all edges of one value, in float32 or wider, rounded once."""
    graph = carrier.graph
    place = {node: i for i, node in enumerate(graph.nodes)}
    by_source: dict[fx.Node, list[Edge]] = {}
    for edge in edges:
        if edge.before_bias:
            _before_bias(carrier, edge)
        else:
            by_source.setdefault(edge.source, []).append(edge)
    for source, group in by_source.items():
        first = min((edge.user for edge in group), key=place.__getitem__)
        scalar = carrier.power(source, group[0].degree, first)
        scaled = graph.insert(aten.mul.Tensor, (source, scalar), first)
        scaled = _cast(graph, scaled, source.meta["val"].dtype, first)
        for edge in group:
            edge.user.replace_input_with(source, scaled)


def _before_bias(carrier: Carrier, edge: Edge) -> None:
    """x W + c becomes (x W) s + c."""
    graph, layer = carrier.graph, edge.user
    x, weight, bias, *rest = layer.args
    product = graph.insert(layer.target, (x, weight, None, *rest), layer, dict(layer.kwargs))
    scaled = graph.insert(aten.mul.Tensor, (product, carrier.power(layer, edge.degree, layer)), layer)
    total = graph.insert(aten.add.Tensor, (scaled, bias), layer)
    layer.replace_all_uses_with(_cast(graph, total, layer.meta["val"].dtype, layer))
    graph.fx.erase_node(layer)


def absorb(carrier: Carrier, absorbers: Iterable[Absorber], power: int) -> None:
    """Multiply each absorbing norm's epsilon, per token, by the scalar to `power` times its degree."""
    for absorber in absorbers:
        norm = absorber.norm
        x: Any = norm.args[0]
        scalar = carrier.power(x, power * absorber.degree, norm)
        eps = carrier.graph.insert(aten.mul.Tensor, (scalar, epsilon(norm)), norm)
        gain, bias, _ = _parts(norm)
        norm.args = (x, gain, bias, eps) if norm.target is layer_norm else (x, gain, eps)
        norm.kwargs = {}


def per_site(graph: Graph, check: Any) -> list[Site]:
    """A site for every norm: `check(graph, norm)` returns what to do, or in words why not."""
    found = []
    for where, norm in norms(graph):
        verdict = undividable(graph, norm) or check(graph, norm)
        found.append(Site(where, verdict) if isinstance(verdict, str) else Site(where, detail=norm))
    return found


def cancels(graph: Graph, norm: fx.Node) -> Reach | str:
    """The reach of a norm whose every path is normalised again, or in words which path is not."""
    found = reach(graph, norm)
    if found.frontier:
        return f"not every path is normalised again: {found.frontier[0]}"
    return found if found.absorbers else "nothing behind it reads its scale"
