"""Add the residual stream where a linear layer stores its output.

    x W^T + b + r

Source: NVIDIA, CUTLASS 1.0, 2017, https://developer.nvidia.com/blog/cutlass-linear-algebra-cuda/ (epilogues).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from taut.graph import Graph, shape
from taut.rewrite import STEP, Exactness, Form, Rewrite, Site
from taut.rewrites._fused import alone, before_views, is_linear, options, put, site

aten = torch.ops.aten


def sites(graph: Graph, form: Form) -> list[Site]:
    taken: set[fx.Node] = set()
    found = []
    for node in graph.calls(aten.add.Tensor):
        layers = [layer for arg in node.args if is_linear(layer := before_views(arg))]
        if layers and not node.kwargs and all(isinstance(arg, fx.Node) for arg in node.args):
            found.append(_site(node, max(layers), taken))
    return found


def _site(node: Any, layer: fx.Node, taken: set[fx.Node]) -> Site:
    residual = _residual(node, layer)
    if shape(residual) != shape(node) or before_views(residual) is layer:
        return site(layer, "what is added is no residual stream")
    if "residual" in options(layer) or layer in taken:
        return site(layer, "something is added to it already")
    if len(layer.users) > 1 or not any(alone(arg, node) for arg in node.args if before_views(arg) is layer):
        return site(layer, "its output is also read without the sum")
    taken.add(layer)
    return site(layer, detail=(node, layer))


def _residual(node: Any, layer: fx.Node) -> Any:
    return node.args[1] if before_views(node.args[0]) is layer else node.args[0]


def change(graph: Graph, chosen: list[Site]) -> None:
    for one in chosen:
        node, layer = one.detail
        put(graph, node, layer, residual=_residual(node, layer))


fuse_residual = Rewrite(
    "fuse_residual",
    Exactness.ALGEBRAIC,
    sites,
    change,
    forms=(STEP,),
    order=23,
    absent="nothing is added to a linear layer's output",
)
