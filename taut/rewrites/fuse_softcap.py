"""Multiply a linear layer's output by a number, and cap it softly, where it is stored.

    c tanh(y s / c)

Source: Gemma Team, Gemma 2, 2024, arXiv:2408.00118, section 2 (logit soft-capping).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from taut.graph import Graph
from taut.lift._match import is_call
from taut.rewrite import STEP, Exactness, Form, Rewrite, Site
from taut.rewrites._fused import alone, is_linear, options, put, site

aten = torch.ops.aten


class Scaled(NamedTuple):
    """softcap(layer * factor): `end` is the node that computes it."""

    end: fx.Node
    layer: Any
    factor: float
    softcap: float | None


def sites(graph: Graph, form: Form) -> list[Site]:
    found = []
    for layer in graph.nodes:
        scaled = _scaled(layer) if is_linear(layer) else None
        if scaled is not None:
            taken = options(layer).keys() & {"factor", "softcap", "residual"}
            found.append(site(layer, "something else is done to its output first" if taken else None, scaled))
    return found


def _scaled(layer: fx.Node) -> Scaled | None:
    end, factor, softcap = layer, 1.0, None
    while len(end.users) == 1 and alone(end, user := next(iter(end.users))):
        if (number := _number(user, end)) is not None:
            end, factor = user, factor * number
        elif is_call(user, aten.tanh.default) and len(user.users) == 1:
            back = next(iter(user.users))
            cap = _number(back, user) or 0.0
            if cap <= 0.0:
                break
            return Scaled(back, layer, factor * cap, cap)
        else:
            break
    return None if end is layer else Scaled(end, layer, factor, softcap)


def _number(node: Any, of: fx.Node) -> float | None:
    """What a node multiplies `of` by, where it does only that."""
    if is_call(node, aten.mul.Tensor) and not node.kwargs:
        other = node.args[1] if node.args[0] is of else node.args[0]
        return float(other) if isinstance(other, int | float) else None
    if is_call(node, aten.div.Tensor) and not node.kwargs and node.args[0] is of:
        return 1.0 / node.args[1] if isinstance(node.args[1], int | float) and node.args[1] else None
    return None


def change(graph: Graph, chosen: list[Site]) -> None:
    for one in chosen:
        end, layer, factor, softcap = one.detail
        more = {"factor": factor} | ({} if softcap is None else {"softcap": softcap})
        put(graph, end, layer, **more)


fuse_softcap = Rewrite(
    "fuse_softcap",
    Exactness.ALGEBRAIC,
    sites,
    change,
    forms=(STEP,),
    order=22,
    absent="no linear layer's output is multiplied by a number",
)
