"""What the fusing rewrites share: a linear layer as `fused_linear`, and who alone reads it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from taut.facts.moves import is_move, move
from taut.graph import Graph, shape
from taut.ops.fused_glu import fused_glu
from taut.ops.fused_linear import fused_linear
from taut.ops.linear import linear
from taut.rewrite import Site

aten = torch.ops.aten


def options(node: Any) -> dict[str, Any]:
    """What a layer has beside its input and its weights, by the names of its fused op."""
    if node.target is not linear:
        return dict(node.kwargs)
    bias = (*node.args, None)[2]
    return {} if bias is None else {"bias": bias}


def put(graph: Graph, old: fx.Node, host: fx.Node, x: Any = None, **more: Any) -> None:
    """Replace `old` by the layer `host`, with more done in the same pass, at the place of `old`.

    `x` takes the place of what the layer reads.
    """
    is_glu = host.target is fused_glu
    args = host.args[1 : 4 if is_glu else 2]
    new = graph.insert(
        fused_glu if is_glu else fused_linear, (host.args[0] if x is None else x, *args), old, options(host) | more
    )
    new.meta["where"], new.meta["line"] = host.meta.get("where", ""), host.meta.get("line", "")
    same = shape(new) == shape(old)
    old.replace_all_uses_with(new if same else graph.insert(aten.reshape.default, (new, list(shape(old))), old))
    graph.fx.erase_node(old)


def before_views(node: Any, alone_in: bool = True) -> Any:
    """A value before views that leave its rows as they are; where `alone_in`, only what nobody else reads."""
    while isinstance(node, fx.Node) and node.op == "call_function" and node.target in VIEWS:
        source: Any = node.args[0]
        if shape(source)[-1:] != shape(node)[-1:] or (alone_in and not alone(source, node)):
            break
        node = source
    return node


VIEWS = (aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim)


def is_linear(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in (linear, fused_linear)


def alone(node: fx.Node, *readers: fx.Node) -> bool:
    return set(node.users) <= set(readers)


def site(node: fx.Node, refused: str | None = None, detail: Any = None) -> Site:
    return Site(node.meta.get("where") or node.name, refused, detail=detail)


def rows_of(node: Any) -> tuple[fx.Node, range] | None:
    """The linear layer whose output a node holds a part of, and which of its rows: evenly spaced and in order."""
    chain: list[fx.Node] = []
    size = shape(node)
    while is_move(node):
        chain.append(node)
        node = node.args[0]
    if not is_linear(node) or not size:
        return None
    index: Any = torch.arange(shape(node)[-1]).expand(shape(node))
    for step in reversed(chain):
        index = None if index is None else move(step, index)
    if index is None or tuple(index.shape) != size or index.numel() != size[-1]:
        return None
    flat = index.flatten().tolist()
    step = flat[1] - flat[0] if len(flat) > 1 else 1
    rows = range(flat[0], flat[-1] + (1 if step > 0 else -1), step) if step else range(0)
    return (node, rows) if list(rows) == flat and step > 0 else None
