"""From a model's step graph as exported to one that is ready to be lowered: lifted, and fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from taut.graph import Graph, shape
from taut.lift import lift
from taut.lift._match import is_call, is_cast, through_casts
from taut.plans import Plan, Refusal, Step
from taut.rewrite import STEP, TAUT, Form, Rewrite, rewrites
from taut.rewrites.fuse_norm_linear import fuse_norm_linear
from taut.rewrites.merge_linears import merge_linears

aten = torch.ops.aten

SHAPED_AS = (
    aten.new_ones.default,
    aten.new_zeros.default,
    aten.new_full.default,
    aten.ones_like.default,
    aten.zeros_like.default,
    aten.full_like.default,
)
"""They look at the shape of a value, not at the value; all of them are told a dtype or give a mask of ones."""


def prepared(graph: Graph, restore: Callable[[Graph], Graph] | None = None) -> Graph:
    """The graph lifted, without casts that cast nothing, and with every fusing rewrite applied.

    `restore` makes of the lifted graph the one that a checkpoint's tensors belong to.
    """
    graph = lift(tidied(graph))
    return fused(graph if restore is None else restore(graph))


def fused(graph: Graph) -> Graph:
    """A lifted step with every fusing rewrite applied."""
    return fuse(graph)[0]


def fuse(graph: Graph) -> tuple[Graph, Plan]:
    """The same, and what was applied where, and what was refused and why."""
    steps: list[Step] = []
    refused: list[Refusal] = []
    absent: dict[str, str] = {}
    for rewrite in rewrites().values():
        if rewrite is fuse_norm_linear:  # what reads one norm and was not fused with what is behind it
            graph = _applied(graph, merge_linears, TAUT, steps, refused, absent)
        if STEP in rewrite.forms and not rewrite.asked:
            graph = _applied(graph, rewrite, STEP, steps, refused, absent)
    return graph, Plan(STEP.name, "logits", tuple(steps), tuple(refused), absent)


def _applied(
    graph: Graph, rewrite: Rewrite, form: Form, steps: list[Step], refused: list[Refusal], absent: dict[str, str]
) -> Graph:
    sites = rewrite.find(graph, form)
    chosen = tuple(site.where for site in sites if site.refused is None)
    refused += [Refusal(rewrite.name, site.where, site.refused) for site in sites if site.refused is not None]
    if not sites:
        absent[rewrite.name] = rewrite.absent
    if not chosen:
        return graph
    steps.append(Step(rewrite.name, chosen))
    return rewrite.apply(graph, chosen, form)


def tidied(graph: Graph) -> Graph:
    """Without casts that cast nothing, and with numbers for the products and quotients with one-element constants."""
    graph = graph.copy()
    for node in list(graph.nodes):
        if is_cast(node):
            source: Any = node.args[0]
            if source.meta["val"].dtype == node.meta["val"].dtype:
                node.replace_all_uses_with(source)
                graph.fx.erase_node(node)
        elif is_call(node, aten.mul.Tensor, aten.div.Tensor):
            node.args = tuple(_number(graph, arg) for arg in node.args)
        elif is_call(node, *SHAPED_AS):
            like: Any = node.args[0]
            node.replace_input_with(like, graph.insert(aten.zeros.default, (list(shape(like)),), node))
        elif is_call(node, aten.baddbmm.default):
            _scores_by_head(graph, node)
        elif is_call(node, aten.softmax.int) and node.args[1] in (-1, 2):
            _softmax_by_head(graph, node)
        elif is_call(node, aten.bmm.default):
            _product_by_head(graph, node)
    graph.fx.eliminate_dead_code()
    return graph


def _number(graph: Graph, arg: Any) -> Any:
    source = through_casts(arg)
    is_buffer = isinstance(source, fx.Node) and source.op == "placeholder" and source.meta["kind"] == "buffer"
    if not is_buffer or source.meta["val"].numel() != 1 or graph.tensors[source.meta["tensor"]].is_meta:
        return arg
    return float(graph.tensors[source.meta["tensor"]])


def _scores_by_head(graph: Graph, node: Any) -> None:
    """bias + alpha q k over (heads, 1, keys) as a matmul with an axis for the batch, as attention is known by."""
    bias, q, k = node.args
    if node.kwargs.get("beta", 1) != 1 or not is_call(k, aten.transpose.int) or len(shape(bias)) != 3:
        return
    turned = graph.insert(aten.transpose.int, (_batched(graph, k.args[0], node), 2, 3), node)
    scores = graph.insert(aten.matmul.default, (_batched(graph, q, node), turned), node)
    scaled = graph.insert(aten.mul.Tensor, (scores, float(node.kwargs.get("alpha", 1))), node)
    _put(graph, node, graph.insert(aten.add.Tensor, (scaled, _batched(graph, bias, node)), node))


def _softmax_by_head(graph: Graph, node: Any) -> None:
    """A softmax of (heads, 1, keys) with an axis for the batch, if its scores had one."""
    scores = node.args[0]
    if is_call(scores, aten.reshape.default) and shape(scores.args[0]) == (1, *shape(scores)):
        _put(graph, node, graph.insert(node.target, (scores.args[0], -1, *node.args[2:]), node, dict(node.kwargs)))


def _product_by_head(graph: Graph, node: Any) -> None:
    weights, values = node.args
    shed = is_call(weights, aten.reshape.default, aten.squeeze.dim)
    if shed and shape(weights.args[0]) == (1, *shape(weights)):
        four = _batched(graph, values, node)
        _put(graph, node, graph.insert(aten.matmul.default, (weights.args[0], four), node))


def _batched(graph: Graph, node: Any, before: fx.Node) -> fx.Node:
    """A value with an axis for the batch in front, which it may have had before."""
    if is_call(node, aten.reshape.default) and shape(node.args[0]) == (1, *shape(node)):
        return node.args[0]
    if is_call(node, aten.transpose.int) and len(shape(node)) == 3 and {axis % 3 for axis in node.args[1:]} == {1, 2}:
        return graph.insert(aten.transpose.int, (_batched(graph, node.args[0], before), 2, 3), before)
    return graph.insert(aten.unsqueeze.default, (node, 0), before)


def _put(graph: Graph, old: fx.Node, new: fx.Node) -> None:
    """`new` is `old` with an axis for the batch in front; who views it so reads it itself."""
    for user in list(old.users):
        if is_call(user, aten.reshape.default) and shape(user) == shape(new):
            user.replace_all_uses_with(new)
    if old.users:
        old.replace_all_uses_with(graph.insert(aten.squeeze.dim, (new, 0), old))
