"""Attention over a cache whose mask depends on the position alone becomes attention over an interval of it.

The mask is not matched but evaluated at every position: what may be seen must be the keys from `first[position]` to the
position, and what is added to the scores must grow evenly with the key's position (ALiBi) or be nothing.

Source: Shazeer, Fast Transformer Decoding, 2019, arXiv:1911.02150, section 2.4; Press et al., ALiBi, 2021,
arXiv:2108.12409, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from taut.graph import Graph, shape
from taut.lift._match import is_call
from taut.ops.attention import attention
from taut.ops.cache_attention import cache_attention
from taut.ops.rope_append import rope_append
from taut.rewrite import STEP, Exactness, Form, Rewrite, Site
from taut.rewrites._fused import site

aten = torch.ops.aten
NAMES = ("mask", "scale", "causal", "softcap", "window", "sinks", "alibi")
HIDDEN = -1e30
FLAT = 16 * torch.finfo(torch.float32).eps
"""How far, of its largest, an added mask may be from a straight line: some roundings of float32."""


def sites(graph: Graph, form: Form) -> list[Site]:
    from taut.runtime.tables import Tables

    tables = Tables(graph)
    seen: dict[fx.Node, Any] = {}
    return [_site(node, tables, seen) for node in graph.calls(attention)]


def _site(node: Any, tables: Any, seen: dict[fx.Node, Any]) -> Site:
    given = dict(zip(NAMES, node.args[3:], strict=False)) | dict(node.kwargs)
    mask = given.get("mask")
    if given.get("causal") or given.get("window") is not None or given.get("alibi") is not None:
        return site(node, "it hides keys in a way of its own")
    if not all(_appended(part, tables) for part in node.args[1:3]):
        return site(node, "its keys or values are not a cache with the new ones at the position")
    if not isinstance(mask, fx.Node) or tables.kinds[mask] != "by position":
        return site(node, "its mask is not a function of the position alone")
    if mask not in seen:
        seen[mask] = _interval(tables, mask, shape(node)[1])
    if isinstance(seen[mask], str):
        return site(node, seen[mask])
    return site(node, detail=(node, given, mask, *seen[mask]))


def _appended(node: Any, tables: Any) -> bool:
    if is_call(node, rope_append):
        return node.args[2].op == "placeholder"
    if not is_call(node, aten.index_copy.default) or node.args[1] != 2 or node.args[0].op != "placeholder":
        return False
    position = node.args[2]
    if tables.kinds[position] != "by position":
        return False
    return torch.equal(tables.table(position).flatten(), torch.arange(tables.max_length))


def _interval(tables: Any, mask: fx.Node, heads: int) -> tuple[Tensor, Tensor | None] | str:
    """The first key that is seen from each position, and the slopes of what is added; or why there are none."""
    size = shape(mask)
    if not size or size[-1] != tables.max_length or mask.meta["val"].numel() not in (size[-1], heads * size[-1]):
        return "its mask is not one row of the cache"
    bad: list[str] = []
    slopes: list[Tensor] = []

    def reduce(values: Tensor, positions: Tensor) -> Tensor:
        values = values.reshape(len(positions), -1, size[-1])
        visible = values if values.dtype == torch.bool else values > HIDDEN
        first = visible[:, 0].int().argmax(-1)
        key = torch.arange(size[-1])
        wanted = (key >= first[:, None]) & (key <= positions[:, None])
        if not bool((visible == wanted[:, None]).all()):
            bad.append("what it hides is not an interval that ends at the position")
        elif values.dtype != torch.bool:
            slope = _slope(values.double(), wanted[:, None], key - positions[:, None])
            bad.append("what it adds to the scores is no straight line") if slope is None else slopes.append(slope)
        return first

    first = tables.table(mask, reduce)
    slopes = [slope for slope in slopes if slope.any()]
    if any((slope - slopes[0]).abs().max() > FLAT * slopes[0].abs().max() for slope in slopes):
        bad.append("what it adds to the scores changes with the position")
    if bad:
        return bad[0]
    return first, slopes[-1].float().expand(heads).contiguous() if slopes else None


def _slope(values: Tensor, visible: Tensor, ago: Tensor) -> Tensor | None:
    """The slope a head, (heads,); zeros where nothing is added; None where it is no line."""
    at_position = values.masked_fill(~visible, 0.0).gather(
        -1, (ago == 0).int().argmax(-1)[:, None, None].expand(-1, values.shape[1], 1)
    )
    rise = (values - at_position).masked_fill(~visible, 0.0)
    run = ago[:, None].double().masked_fill(~visible, 0.0)
    slope = (rise * run).sum((0, 2)) / run.square().sum((0, 2)).clamp_min(1.0)
    off = (rise - slope[:, None] * run).abs().max()
    return slope if off <= FLAT * max(float(rise.abs().max()), 1e-30) or not rise.any() else None


def change(graph: Graph, chosen: list[Site]) -> None:
    position = graph.placeholders("input")["position"]
    buffers: dict[fx.Node, tuple[fx.Node, fx.Node | None]] = {}
    for one in chosen:
        node, given, mask, first, alibi = one.detail
        if mask not in buffers:
            n = len(buffers)
            slopes = None if alibi is None else _buffer(graph, f"alibi.{n}", alibi)
            buffers[mask] = _buffer(graph, f"first.{n}", first), slopes
        start, slopes = buffers[mask]
        kept = {name: given[name] for name in ("scale", "softcap", "sinks") if given.get(name) is not None}
        kept |= {} if slopes is None else {"alibi": slopes}
        new = graph.insert(cache_attention, (*node.args[:3], position, start), node, kept)
        node.replace_all_uses_with(new)
        graph.fx.erase_node(node)


def _buffer(graph: Graph, name: str, tensor: Tensor) -> fx.Node:
    graph.tensors = dict(graph.tensors) | {name: tensor}
    return graph.add_placeholder("buffer", name, tensor)


decode_attention = Rewrite(
    "decode_attention",
    Exactness.ALGEBRAIC,
    sites,
    change,
    forms=(STEP,),
    order=26,
    absent="there is no attention over a cache",
)
