"""What the rewrites of weights to codes share: which parameters are read as matrices alone, and the nodes that read
their codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from taut.coded import STORED, Codes, Decoded, Noisy, Scales, Turned, sizes
from taut.facts.contraction import also_read, uses
from taut.facts.moves import SWAPS, is_move
from taut.graph import Graph, shape
from taut.lift._match import is_call, is_cast
from taut.ops._weights import GROUP
from taut.ops.dequantize import dequantize
from taut.ops.expert_linear import expert_linear
from taut.ops.linear import linear
from taut.rewrite import TAUT, Bound, Exactness, Form, Rewrite, Site
from taut.values import Value

aten = torch.ops.aten


@dataclass(eq=False)
class Matrix:
    """A parameter that is read as a weight (out, in), or as its transpose where `turned`: by whom."""

    name: str
    bits: int
    turned: bool = False
    products: list[Any] = field(default_factory=list)
    lookups: list[Any] = field(default_factory=list)

    @property
    def codes(self) -> str:
        return f"{self.name}.codes"

    @property
    def scale(self) -> str:
        return f"{self.name}.scale"


def rewrite(name: str, bits: int, perplexity: float | None) -> Rewrite:
    """The rewrite that keeps the weights of linear layers and of the token embedding as codes."""

    def sites(graph: Graph, form: Form) -> list[Site]:
        used = uses(graph)
        found = (_site(graph, leaf, bits, used[parameter]) for parameter, leaf in _matrices(graph))
        return [site for site in found if site is not None]

    return Rewrite(
        name,
        Exactness.BOUNDED,
        sites,
        _change,
        forms=(TAUT,),
        asked=True,
        order=30,
        absent="no linear layer reads a weight as it is stored",
        bound=Bound(_decoded, _noisy, perplexity),
    )


def _matrices(graph: Graph) -> list[tuple[str, fx.Node]]:
    found = graph.placeholders("parameter").items()
    return [(name, n) for name, n in found if n.meta["val"].is_floating_point() and len(shape(n)) in (2, 3)]


def _site(graph: Graph, leaf: fx.Node, bits: int, used: set[fx.Node]) -> Site | None:
    """None for what is no weight of a linear layer and no table of tokens."""
    name = leaf.meta["tensor"]
    where = name.rpartition(".")[0] or name
    if any(node.target is expert_linear for node in used):
        return Site(where, "experts' weights lie in one tensor, which no kernel reads as codes")
    found = Matrix(name, bits)
    known = _read(graph, leaf, found)
    outside = used - {*found.products, *found.lookups}
    if not found.products and not found.lookups:
        return None
    if outside:
        return Site(where, also_read(graph, name, outside))
    if not known:
        return Site(where, f"{name} is read in more ways than one")
    inputs = shape(leaf)[0 if found.turned else 1]
    if bits == 4 and inputs % GROUP:
        return Site(where, f"its {inputs} inputs are no multiple of {GROUP}")
    return Site(where, None, (name,), (found.codes, found.scale), detail=found)


def _read(graph: Graph, leaf: fx.Node, found: Matrix) -> bool:
    """Note who reads a parameter, past casts and transposes; whether all of them read it the same way round."""
    todo, ways = [(leaf, False)], set[bool]()
    while todo:
        source, turned = todo.pop()
        for user in sorted(source.users):
            if is_cast(user) or is_call(user, *SWAPS):
                todo.append((user, turned != is_call(user, *SWAPS)))
            elif is_call(user, linear) and user.args[1] is source and source not in (user.args[0], *user.args[2:]):
                found.products.append(user)
                ways.add(turned)
            elif is_call(user, aten.embedding.default) and user.args[0] is source and _is_token(user.args[1]):
                found.lookups.append(user)
                ways.add(turned)
    found.turned = True in ways
    return len(ways) < 2 and not (found.turned and found.lookups)


def _is_token(node: Any) -> bool:
    while is_move(node) or is_cast(node):
        node = node.args[0]
    return isinstance(node, fx.Node) and node.op == "placeholder" and node.meta["kind"] == "input"


def _change(graph: Graph, chosen: list[Site]) -> None:
    for site in chosen:
        _put(graph, site.detail)


def _put(graph: Graph, matrix: Matrix) -> None:
    value, size = graph.values[matrix.name], shape(graph.placeholders("parameter")[matrix.name])
    value, size = (Turned(value), size[::-1]) if matrix.turned else (value, size)
    likes = [
        torch.empty(part, dtype=dtype, device="meta")
        for part, dtype in zip(sizes(size[0], size[1], matrix.bits), STORED[matrix.bits], strict=True)
    ]
    codes = graph.add_parameter(matrix.codes, Codes(value, matrix.bits), likes[0])
    scale = graph.add_parameter(matrix.scale, Scales(value, matrix.bits), likes[1])
    for node in matrix.lookups:
        parts = [graph.insert(aten.index.Tensor, (part, [node.args[1]]), node) for part in (codes, scale)]
        rows = graph.insert(dequantize, tuple(parts), node)
        wanted = node.meta["val"].dtype
        if wanted != rows.meta["val"].dtype:
            rows = graph.insert(aten._to_copy.default, (rows,), node, {"dtype": wanted})
        node.replace_all_uses_with(rows)
        graph.fx.erase_node(node)
    if matrix.products:
        weight = graph.insert(dequantize, (codes, scale), min(matrix.products))
        for node in matrix.products:
            node.update_arg(1, weight)


def _decoded(site: Site, value_of: Callable[[str], Value]) -> dict[str, Value]:
    matrix: Matrix = site.detail
    decoded = Decoded(value_of(matrix.codes), value_of(matrix.scale), matrix.bits)
    return {matrix.name: Turned(decoded) if matrix.turned else decoded}


def _noisy(graph: Graph, site: Site, seed: int) -> dict[str, Value]:
    matrix: Matrix = site.detail
    value = graph.values[matrix.name]
    if matrix.turned:
        return {matrix.name: Turned(Noisy(Turned(value), matrix.bits, matrix.name, seed))}
    return {matrix.name: Noisy(value, matrix.bits, matrix.name, seed)}
