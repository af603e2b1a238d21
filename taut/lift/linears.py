"""Linear layers: addmm, mm, matmul with a parameter, and grouped expert products."""

from __future__ import annotations

import torch
from torch import fx

from taut.graph import Graph, shape
from taut.lift._match import is_constant, replace
from taut.ops.expert_linear import expert_linear
from taut.ops.linear import linear

ORDER = 0
aten = torch.ops.aten


def lift(graph: Graph) -> None:
    known: dict[fx.Node, bool] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten.linear.default:
            replace(graph, node, linear, node.args)
        elif node.target is aten.addmm.default and not node.kwargs:
            bias, x, weight = node.args
            if is_constant(weight, known) and not is_constant(x, known) and len(shape(bias)) == 1:
                replace(graph, node, linear, (x, _transposed(graph, node, weight), bias))
        elif node.target in (aten.mm.default, aten.matmul.default):
            x, weight = node.args
            if is_constant(weight, known) and not is_constant(x, known) and len(shape(weight)) == 2:
                replace(graph, node, linear, (x, _transposed(graph, node, weight)))
        elif "grouped_mm" in str(node.target) and len(node.args) >= 3 and len(shape(node.args[1])) == 3:
            replace(graph, node, expert_linear, node.args[:3])


def _transposed(graph: Graph, before: fx.Node, weight: fx.Node) -> fx.Node:
    """The weight as (out, in); a transpose of a transpose is the parameter itself."""
    if weight.op == "call_function" and weight.target is aten.t.default:
        return weight.args[0]
    if weight.op == "call_function" and weight.target is aten.transpose.int and len(shape(weight)) == 2:
        return weight.args[0]
    with graph.fx.inserting_before(before):
        turned = graph.fx.call_function(aten.transpose.int, (weight, 0, 1))
    turned.meta = dict(weight.meta) | {"val": weight.meta["val"].transpose(0, 1), "where": before.meta["where"]}
    turned.meta.pop("kind", None)
    return turned
