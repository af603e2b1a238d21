"""Compute both products of a gated linear unit, its activation and its product in one pass.

    act(x G^T + g) * (x U^T + u)

The two layers may be one whose output is split: then each takes its rows of the weight.

Source: Graef, Wasielewski and Clapp, FlashNorm, 2024, arXiv:2407.09577, section 2.2; Shazeer, GLU Variants Improve
Transformer, 2020, arXiv:2002.05202, eq. 5 and 6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from taut.graph import Graph, shape
from taut.ops.fused_glu import fused_glu
from taut.ops.glu import glu
from taut.ops.linear import linear
from taut.rewrite import STEP, Exactness, Form, Rewrite, Site
from taut.rewrites._fused import options, rows_of, site

aten = torch.ops.aten


@dataclass(frozen=True)
class Half:
    layer: Any
    rows: range


def sites(graph: Graph, form: Form) -> list[Site]:
    return [_site(node) for node in graph.calls(glu)]


def _site(node: Any) -> Site:
    halves = [rows_of(node.args[0]), rows_of(node.args[1])]
    if any(half is None or half[0].target is not linear for half in halves):
        return site(node, "a half is not (a part of) a linear layer")
    gate, up = (Half(*half) for half in halves if half is not None)
    if gate.layer.args[0] is not up.layer.args[0]:
        return site(node, "its halves are linear in different values")
    return site(node, detail=(node, gate, up))


def change(graph: Graph, chosen: list[Site]) -> None:
    for one in chosen:
        node, *halves = one.detail
        weights = [_part(graph, half, half.layer.args[1], node) for half in halves]
        biases = [_part(graph, half, options(half.layer).get("bias"), node) for half in halves]
        named = {name: b for name, b in zip(("gate_bias", "up_bias"), biases, strict=True) if b is not None}
        act = (*node.args, "silu")[2]
        new = graph.insert(fused_glu, (halves[0].layer.args[0], *weights, act), node, named)
        node.replace_all_uses_with(new)
        graph.fx.erase_node(node)


def _part(graph: Graph, half: Half, parameter: fx.Node | None, before: fx.Node) -> fx.Node | None:
    """The half's rows of a weight or a bias."""
    if parameter is None or half.rows == range(shape(parameter)[0]):
        return parameter
    return graph.insert(aten.slice.Tensor, (parameter, 0, half.rows.start, half.rows.stop, half.rows.step), before)


fuse_glu = Rewrite(
    "fuse_glu",
    Exactness.ALGEBRAIC,
    sites,
    change,
    forms=(STEP,),
    order=20,
    absent="there is no gated linear unit",
)
