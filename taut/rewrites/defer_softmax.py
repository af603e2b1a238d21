"""Divide a softmax behind its product with the values.

    softmax(s) V  =  (exp(s - max s) V) / sum(exp(s - max s))

Cost: the division meets one number for each value feature of a head in place of one for each key, so it pays where a
head has fewer value features than keys, and the product need not wait for the sum (`taut/two_engines.py` counts it in
cycles). What finds the largest score stays.

Source: Salmani and Soloveychik, LLM inference acceleration via efficient operation fusion, 2025, arXiv:2502.17728,
section on softmax.
Differs: the cost decides each site. Fused attention kernels divide last by themselves: it runs only when asked for.
"""

from __future__ import annotations

from typing import Any

from taut.graph import Graph
from taut.ops.attention import attention
from taut.ops.deferred_attention import deferred_attention
from taut.rewrite import TAUT, Exactness, Form, Rewrite, Site


def sites(graph: Graph, form: Form) -> list[Site]:
    return [
        Site(node.meta["where"] or node.name, _useless(*node.args[1:3]), detail=node) for node in graph.calls(attention)
    ]


def _useless(keys: Any, values: Any) -> str | None:
    """Why dividing later divides no fewer numbers; a length that is not fixed is taken for a long one."""
    count, width = keys.meta["val"].shape[2], values.meta["val"].shape[3]
    if not isinstance(count, int) or width < count:
        return None
    return f"{width} value features a head are no fewer than {count} keys: it would divide as many numbers, or more"


def change(graph: Graph, chosen: list[Site]) -> None:
    for site in chosen:
        site.detail.target = deferred_attention


defer_softmax = Rewrite(
    "defer_softmax",
    Exactness.ALGEBRAIC,
    sites,
    change,
    forms=(TAUT,),
    asked=True,
    order=30,
    absent="the model has no softmax attention",
)
