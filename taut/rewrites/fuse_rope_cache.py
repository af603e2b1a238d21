"""Turn a new key and put it into the cache in one pass.

Source: Su et al., RoFormer, 2021, arXiv:2104.09864, eq. 34; Shazeer, 2019, arXiv:1911.02150, section 2.4.
"""

from __future__ import annotations

from typing import Any

import torch

from taut.graph import Graph
from taut.lift._match import is_call
from taut.ops.rope import rope
from taut.ops.rope_append import rope_append
from taut.rewrite import STEP, Exactness, Form, Rewrite, Site
from taut.rewrites._fused import alone, site

aten = torch.ops.aten


def sites(graph: Graph, form: Form) -> list[Site]:
    copies = (node for node in graph.calls(aten.index_copy.default) if is_call(node.args[3], rope))
    return [_site(node) for node in copies]


def _site(node: Any) -> Site:
    cache, axis, position, turned = node.args
    if axis != 2 or cache.op != "placeholder" or position.op != "placeholder":
        return site(node, "it is not put at the position of a cache")
    if not alone(turned, node):
        return site(node, "the turned key is read by something else too")
    return site(node, detail=node)


def change(graph: Graph, chosen: list[Site]) -> None:
    for one in chosen:
        cache, _, position, turned = one.detail.args
        x, cos, sin, *rest = turned.args
        new = graph.insert(rope_append, (cache, x, position, cos, sin, *rest), one.detail)
        one.detail.replace_all_uses_with(new)
        graph.fx.erase_node(one.detail)


fuse_rope_cache = Rewrite(
    "fuse_rope_cache",
    Exactness.ALGEBRAIC,
    sites,
    change,
    forms=(STEP,),
    order=25,
    absent="no turned key is put into a cache",
)
