"""What attention computes of each cached token by itself is computed once, when the token comes, and cached instead.

A function of one token commutes with appending: f(append(cache, x)) = append(f(cache), f(x)). Latent attention, which
widens its whole cache at every step, so becomes plain attention over keys and values by head.

Source: DeepSeek-AI, DeepSeek-V2, 2024, arXiv:2405.04434, section 2.1, eq. 9 to 19 (keys and values by head are linear
in what is cached).
Differs: the paper absorbs the widening into the query, which keeps the cache small; here the cache grows by the number
of heads, and a step reads no weight more than once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from taut.facts.moves import RESHAPES, is_move, move
from taut.graph import Graph, is_getitem, shape
from taut.lift._match import is_call
from taut.ops.attention import attention
from taut.ops.layer_norm import layer_norm
from taut.ops.linear import linear
from taut.ops.rms_norm import rms_norm
from taut.rewrite import STEP, Exactness, Form, Rewrite, Site
from taut.rewrites._fused import site

aten = torch.ops.aten
BY_TOKEN = (linear, rms_norm, layer_norm)
TOKENS = 2
"""The axis of a cache along which tokens stand."""


def sites(graph: Graph, form: Form) -> list[Site]:
    return [_site(node) for node in graph.calls(attention) if not all(_is_cache(part) for part in node.args[1:3])]


def _site(node: Any) -> Site:
    if any(_axis(part) != TOKENS for part in node.args[1:3]):
        return site(node, "its keys or values are no function of each cached token alone")
    return site(node, detail=node)


def _is_cache(node: Any) -> bool:
    copied = is_call(node, aten.index_copy.default) and node.args[1] == TOKENS
    return copied and node.args[0].op == "placeholder" and node.args[0].meta["kind"] == "input"


def _axis(node: Any) -> int | None:
    """The axis along which tokens stand in a value that is computed of each cached token alone; None for others."""
    if _is_cache(node):
        return TOKENS
    if is_move(node):
        return _moved_axis(node)
    parts = _parts(node)
    axes = {_axis(part) for part in parts}
    axis = axes.pop() if len(axes) == 1 else None
    return None if axis is None or axis == _joined(node) else axis


def _moved_axis(node: Any) -> int | None:
    chain = [node.args[0], node] if is_getitem(node) and is_move(node.args[0]) else [node]
    source: Any = chain[0].args[0]
    axis = _axis(source)
    if axis is None:
        return None
    size = shape(source)
    tokens = torch.arange(size[axis], dtype=torch.int32)
    index: Any = tokens.as_strided(size, [int(i == axis) for i in range(len(size))])
    for link in chain:
        index = None if index is None else move(link, index)
    if index is None:
        return None
    whole = (i for i, n in enumerate(index.shape) if n == len(tokens))
    return next((i for i in whole if bool((index.movedim(i, -1) == tokens).all())), None)


def _parts(node: Any) -> list[fx.Node]:
    """The values that a node joins along one axis, or the one that it is computed of."""
    if node.target in BY_TOKEN:
        return [node.args[0]]
    if is_call(node, aten.cat.default):
        return list(node.args[0])
    return [part for _, part in _pasted(node)]


def _joined(node: Any) -> int:
    """The axis along which a node joins its parts, or mixes what it is computed of."""
    if node.target in BY_TOKEN:
        return len(shape(node)) - 1
    axis = (*node.args, 0)[1] if is_call(node, aten.cat.default) else node.args[2]
    return axis % len(shape(node))


def _pasted(node: Any) -> list[tuple[int, fx.Node]]:
    """What was put side by side into an empty tensor, with the places at which it begins; [] for anything else."""
    if not is_call(node, aten.slice_scatter.default):
        return []
    parts: list[tuple[int, Any]] = []
    axis: int = node.args[2]
    while is_call(node, aten.slice_scatter.default) and node.args[2] == axis and len(node.args) < 6:
        parts.append((node.args[3] or 0, node.args[1]))
        node = node.args[0]
    parts.sort(key=lambda part: part[0])
    ends = [start + shape(part)[axis] for start, part in parts]
    tiled = [start for start, _ in parts] == [0, *ends[:-1]] and bool(parts) and ends[-1] == shape(node)[axis]
    return parts if tiled and is_call(node, aten.new_empty.default) else []


def _of_one(graph: Graph, node: Any, before: fx.Node) -> fx.Node:
    """The same function of the new token alone."""
    if _is_cache(node):
        return node.args[3]
    if not is_move(node):
        parts = [_of_one(graph, part, before) for part in _parts(node)]
        if node.target in BY_TOKEN:
            return graph.insert(node.target, (parts[0], *node.args[1:]), before, dict(node.kwargs))
        return graph.insert(aten.cat.default, (parts, _joined(node)), before)
    args = (_of_one(graph, node.args[0], before), *node.args[1:])
    if node.target in RESHAPES or is_call(node, aten.expand.default):
        axis = _axis(node)
        args = args[0], [1 if i == axis else n for i, n in enumerate(shape(node))]
    return graph.insert(node.target, args, before, dict(node.kwargs))


def change(graph: Graph, chosen: list[Site]) -> None:
    for one in chosen:
        node = one.detail
        position = graph.placeholders("input")["position"]
        count = sum(name.startswith("keys.") for name in graph.placeholders("input"))
        for i, name in enumerate(("keys", "values"), start=1):
            new, size = _of_one(graph, node.args[i], node), list(shape(node.args[i]))
            like = torch.empty(size, device="meta", dtype=new.meta["val"].dtype)
            cache = graph.add_placeholder("input", f"{name}.{count}", like)
            appended = graph.insert(aten.index_copy.default, (cache, TOKENS, position, new), node)
            node.update_arg(i, appended)
    graph.fx.eliminate_dead_code()
    _renumber(graph)


def _renumber(graph: Graph) -> None:
    """Without the caches that nobody uses any more."""
    inputs, count = graph.placeholders("input"), 0
    for layer in range(sum(name.startswith("keys.") for name in inputs)):
        pair = {name: inputs[f"{name}.{layer}"] for name in ("keys", "values")}
        used = any(node.users for node in pair.values())
        for name, node in pair.items():
            if used:
                node.meta = node.meta | {"tensor": f"{name}.{count}"}
            else:
                graph.fx.erase_node(node)
        count += used


cache_heads = Rewrite(
    "cache_heads",
    Exactness.ALGEBRAIC,
    sites,
    change,
    forms=(STEP,),
    order=24,
    absent="attention reads its caches as they are",
)
