"""Scale degree: how far the division of one norm reaches, and where it must be put in if it is left out.

The norm multiplies token i by one scalar, s_i = 1 / sqrt(mean(x_i^2) + eps). Every value behind it carries (k, i): it
equals s_i^k times what it would be without that division. An edge has one degree k; i is said for every element, for
a + roll(a) has equal degrees and the scalars of different tokens. What is not listed here needs degree 0.

Beside each value stands how its scalar, a tensor with one element where the value has many of one token, follows from
the scalar before it. Static sizes serve to find the step; the steps themselves hold none but the model's own.
"""

from __future__ import annotations

import torch
from torch import fx

from taut.facts.contraction import contraction
from taut.facts.degree.records import Absorber, Edge, Reach, Scaled
from taut.facts.degree.rules import NORMS, RULES, unknown
from taut.facts.degree.sums import contract
from taut.facts.degree.walk import Walk
from taut.graph import Graph, shape

__all__ = ["NORMS", "Absorber", "Edge", "Reach", "reach"]


def reach(graph: Graph, norm: fx.Node, *, until_product: bool = False) -> Reach:
    """Follow the scalar of a norm through the graph; with `until_product` no farther than the first products."""
    if graph.memo is None:
        return _reach(graph, norm, until_product)
    key = (reach, norm, until_product)
    if key not in graph.memo:
        graph.memo[key] = _reach(graph, norm, until_product)
    return graph.memo[key]


def _reach(graph: Graph, norm: fx.Node, until_product: bool) -> Reach:
    walk = Walk(Reach(norm), until_product)
    size = shape(norm)[:-1]
    ids = torch.arange(torch.Size(size).numel()).view(*size, 1)
    walk.found.scaled[norm] = Scaled(1, ids, None)
    walk.live.add(norm)
    waiting = set(norm.users)
    for node in graph.nodes:
        if node in waiting:
            _visit(walk, node)
            if node in walk.live:
                waiting.update(node.users)
    return walk.found


def _visit(walk: Walk, node: fx.Node) -> None:
    product = contraction(node, walk.known)
    if product is not None and product.x in walk.live:
        result = contract(walk, product)
    else:
        result = RULES.get("output" if node.op == "output" else node.target, unknown)(walk, node)
    if isinstance(result, str):
        for source in walk.sources(node):
            walk.stop(node, source, result)
    elif result is not None and result.degree != 0:
        walk.found.scaled[node] = result
        if walk.until_product and product is not None:
            for user in node.users:
                walk.stop(user, node, "stands behind its product")
        else:
            walk.live.add(node)
