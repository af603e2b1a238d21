"""Compute a norm in the same pass as the linear layers that read it: its output is never stored.

    norm(x) W^T + b        with the division behind the product or before it, as the kernel likes

Source: Graef, Wasielewski and Clapp, FlashNorm, 2024, arXiv:2407.09577, section 2.
Differs: LayerNorm too; every reader computes the norm anew, which costs one more read of a row that is in cache.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from taut.graph import Graph
from taut.ops.fused_glu import fused_glu
from taut.ops.fused_linear import fused_linear
from taut.ops.layer_norm import layer_norm
from taut.ops.linear import linear
from taut.ops.rms_norm import rms_norm
from taut.rewrite import STEP, Exactness, Form, Rewrite, Site
from taut.rewrites._fused import before_views, put, site


def sites(graph: Graph, form: Form) -> list[Site]:
    readers = graph.calls(linear, fused_linear, fused_glu)
    return [_site(node, norm) for node in readers if _is_norm(norm := before_views(node.args[0], alone_in=False))]


def _is_norm(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in (rms_norm, layer_norm)


def _site(node: fx.Node, norm: Any) -> Site:
    if not isinstance(_parts(norm)["eps"], float | int):
        return site(node, "its epsilon is computed for every token")
    if "eps" in node.kwargs:
        return site(node, "it has a norm before this one")
    return site(node, detail=(node, norm))


def _parts(norm: Any) -> dict[str, Any]:
    """A norm as options of `fused_linear`."""
    centred = norm.target is layer_norm
    names = ("gain", "shift", "eps") if centred else ("gain", "eps")
    given = dict(zip(names, norm.args[1:], strict=False)) | dict(norm.kwargs)
    if "bias" in given:
        given["shift"] = given.pop("bias")
    parts = {"eps": 1e-5 if centred else 1e-6, "centred": centred} | given
    return {name: part for name, part in parts.items() if part is not None}


def change(graph: Graph, chosen: list[Site]) -> None:
    for one in chosen:
        node, norm = one.detail
        put(graph, node, node, norm.args[0], **_parts(norm))


fuse_norm_linear = Rewrite(
    "fuse_norm_linear",
    Exactness.ALGEBRAIC,
    sites,
    change,
    forms=(STEP,),
    order=24,
    absent="no linear layer reads a norm",
)
