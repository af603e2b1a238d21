"""Linear layers: addmm, mm, matmul with a parameter, and grouped expert products."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from taut.graph import Graph, shape
from taut.lift._match import is_call, is_constant, replace
from taut.ops.expert_linear import expert_linear
from taut.ops.linear import linear

ORDER = 0
aten = torch.ops.aten


def lift(graph: Graph) -> None:
    known: dict[fx.Node, bool] = {}
    for node in list(graph.nodes):
        args: Any = node.args
        if node.op != "call_function":
            continue
        if node.target is aten.linear.default:
            if _is_layer(shape(args[1])[::-1], *args[2:]):
                replace(graph, node, linear, args)
        elif node.target is aten.addmm.default and not node.kwargs:
            bias, x, weight = args
            if is_constant(weight, known) and not is_constant(x, known) and _is_layer(shape(weight), bias):
                replace(graph, node, linear, (x, _transposed(graph, node, weight), bias))
        elif node.target in (aten.mm.default, aten.matmul.default):
            x, weight = args
            if is_constant(weight, known) and not is_constant(x, known) and _is_layer(shape(weight)):
                replace(graph, node, linear, (x, _transposed(graph, node, weight)))
        elif "grouped_mm" in str(node.target) and _is_grouped(node):
            replace(graph, node, expert_linear, args[:3])


def _is_layer(weight: tuple[int, ...], bias: Any = None) -> bool:
    """Whether the shape of a weight, (in, out), and a bias fit; a bias of one element is broadcast, and does not."""
    return len(weight) == 2 and (bias is None or shape(bias) == weight[1:])


def _is_grouped(node: fx.Node) -> bool:
    """Whether experts' weights are multiplied by their tokens, and nothing is added."""
    args: Any = (*node.args, None, None, None, None)
    x, weight, offsets, bias = args[:4]
    if not isinstance(offsets, fx.Node) or offsets.meta["val"].is_floating_point():
        return False
    return node.kwargs.get("bias", bias) is None and len(shape(x)) == 2 and len(shape(weight)) == 3


def _transposed(graph: Graph, before: fx.Node, weight: fx.Node) -> fx.Node:
    """The weight as (out, in); a transpose of a transpose is the parameter itself."""
    args: Any = weight.args
    if is_call(weight, aten.t.default) or (is_call(weight, aten.transpose.int) and _swaps(*args[1:])):
        return args[0]
    with graph.fx.inserting_before(before):
        turned = graph.fx.call_function(aten.transpose.int, (weight, 0, 1))
    turned.meta = dict(weight.meta) | {"val": weight.meta["val"].transpose(0, 1), "where": before.meta["where"]}
    turned.meta.pop("kind", None)
    return turned


def _swaps(one: int, two: int) -> bool:
    return one % 2 != two % 2
