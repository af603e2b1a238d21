"""Apply an activation where the linear layer before it stores its output.

Source: NVIDIA, CUTLASS 1.0, 2017, https://developer.nvidia.com/blog/cutlass-linear-algebra-cuda/ (epilogues).
Differs: which activation it is, is found by evaluating it, however it is spelled.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from taut.graph import Graph, shape
from taut.lift._match import through_casts
from taut.lift.glu import named_activation
from taut.rewrite import STEP, Exactness, Form, Rewrite, Site
from taut.rewrites._fused import before_views, is_linear, options, put, site


def sites(graph: Graph, form: Form) -> list[Site]:
    """From the last node to the first: the whole expression comes before its parts."""
    tried: dict[fx.Node, Any] = {}
    taken: set[fx.Node] = set()
    found = []
    for node in reversed(list(graph.nodes)):
        known = None if node.op != "call_function" else named_activation(node, tried)
        layer: Any = None if known is None else before_views(through_casts(known[1]))
        if known is None or not is_linear(layer) or layer in taken or shape(layer)[-1] != shape(node)[-1]:
            continue
        taken.add(layer)
        found.append(_site(node, layer, known[0]))
    return found[::-1]


def _site(node: fx.Node, layer: Any, act: str) -> Site:
    if not _only_read_by(layer, node):
        return site(layer, "its output is also read before the activation")
    if options(layer).keys() & {"act", "factor", "softcap", "residual"}:
        return site(layer, "something else is done to its output first")
    return site(layer, detail=(node, layer, act))


def _only_read_by(layer: fx.Node, node: fx.Node) -> bool:
    """Whether everything that reads the layer ends in the node."""
    inside, edge = {node}, [node]
    while edge:
        for source in edge.pop().all_input_nodes:
            if source is not layer and source not in inside and source > layer:
                inside.add(source)
                edge.append(source)
    return all(user in inside for part in (inside - {node}) | {layer} for user in part.users)


def change(graph: Graph, chosen: list[Site]) -> None:
    for one in chosen:
        node, layer, act = one.detail
        put(graph, node, layer, act=act)


fuse_activation = Rewrite(
    "fuse_activation",
    Exactness.ALGEBRAIC,
    sites,
    change,
    forms=(STEP,),
    order=21,
    absent="no activation reads a linear layer",
)
