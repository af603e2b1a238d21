"""Merge linear layers that read the same value (query, key and value; gate and up) into one product and a split.

    x W1^T, x W2^T   =   split(x [W1; W2]^T)

One product reads x once and keeps a machine busier than several small ones.

Source: Shoeybi et al., Megatron-LM, 2019, arXiv:1909.08053 (query, key and value as one product, in its code).
Differs: siblings are found by data flow; shared weights, mixed dtypes and a bias in some of them only are refused.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from taut.facts.contraction import also_read, name_of, uses
from taut.graph import Graph, shape
from taut.ops.linear import linear
from taut.rewrite import TAUT, Exactness, Form, Rewrite, Site
from taut.values import Stacked

aten = torch.ops.aten


@dataclass
class Group:
    """Linear layers that become one; `parts` are their argument positions that hold parameters."""

    products: list[Any]
    parent: str
    name: str
    parts: tuple[int, ...]


def sites(graph: Graph, form: Form) -> list[Site]:
    used = uses(graph)
    by_input: dict[fx.Node, list[Any]] = {}
    for product in graph.calls(linear):
        if isinstance(product.args[0], fx.Node):
            by_input.setdefault(product.args[0], []).append(product)
    return [_site(graph, siblings, used) for siblings in by_input.values() if len(siblings) > 1]


def _site(graph: Graph, siblings: list[Any], used: dict[str, set[fx.Node]]) -> Site:
    paths = [_path(product) for product in siblings]
    parent = _common(paths)
    names = [path[len(parent) :].removeprefix(".") for path in paths]
    where = ".".join(part for part in (parent, "+".join(names)) if part)
    parts = (1, 2) if len(_plain(siblings[0].args)) == 3 else (1,)
    reason = _reason(graph, siblings, parts, used)
    if reason is not None:
        return Site(where, reason)
    group = Group(siblings, parent, "_".join(name.replace(".", "_") for name in names), parts)
    parameters = tuple(name for part in parts for name in _parameters(siblings, part))
    return Site(where, None, reads=parameters, writes=tuple(_new_names(group).values()), detail=group)


def _path(product: fx.Node) -> str:
    """The module that owns a product's weight."""
    weight: Any = product.args[1]
    if isinstance(weight, fx.Node) and weight.op == "placeholder":
        return weight.meta["tensor"].rpartition(".")[0]
    return product.meta["where"] or product.name


def _common(paths: list[str]) -> str:
    """The longest module path that all of them are in."""
    split = [path.split(".")[:-1] for path in paths]
    shared = 0
    while all(len(path) > shared and path[shared] == split[0][shared] for path in split):
        shared += 1
    return ".".join(split[0][:shared])


def _plain(args: tuple) -> tuple:
    return args[:-1] if args[-1] is None else args


def _reason(graph: Graph, siblings: list[Any], parts: tuple[int, ...], used: dict[str, set[fx.Node]]) -> str | None:
    if any(len(_plain(product.args)) != len(parts) + 1 or product.kwargs for product in siblings):
        return "some of them have a bias and others have none"
    for part in parts:
        nodes = [product.args[part] for product in siblings]
        for product, node in zip(siblings, nodes, strict=True):
            if node.op != "placeholder" or node.meta["kind"] != "parameter":
                return f"{name_of(product)} does not read its parameters as they are stored, but {name_of(node)}"
            name = node.meta["tensor"]
            outside = used[name] - {product}
            if outside:
                return also_read(graph, name, outside)
        if len({graph.dtype_of(node.meta["tensor"]) for node in nodes}) > 1:
            return "their parameters have different dtypes"
    return None


def _parameters(siblings: list[Any], part: int) -> list[str]:
    return [product.args[part].meta["tensor"] for product in siblings]


def _new_names(group: Group) -> dict[int, str]:
    prefix = f"{group.parent}.{group.name}" if group.parent else group.name
    return {part: f"{prefix}.{kind}" for part, kind in ((1, "weight"), (2, "bias")) if part in group.parts}


def change(graph: Graph, chosen: list[Site]) -> None:
    for site in chosen:
        _merge(graph, site.detail)


def _merge(graph: Graph, group: Group) -> None:
    first, names = min(group.products), _new_names(group)
    merged = [_stacked(graph, group.products, part, names[part]) for part in group.parts]
    product = graph.insert(linear, (first.args[0], *merged), first)
    sizes = [shape(one)[-1] for one in group.products]
    split = graph.insert(aten.split_with_sizes.default, (product, sizes, -1), first)
    for new in (product, split):
        new.meta["where"] = group.parent
    for i, old in enumerate(group.products):
        piece = graph.insert(operator.getitem, (split, i), first)
        piece.meta |= {"where": old.meta["where"], "line": old.meta["line"]}
        old.replace_all_uses_with(piece)
    for old in group.products:
        graph.fx.erase_node(old)


def _stacked(graph: Graph, products: list[Any], part: int, name: str) -> fx.Node:
    parameters = _parameters(products, part)
    nodes = [product.args[part] for product in products]
    heights = tuple(shape(node)[0] for node in nodes)
    like = torch.empty((sum(heights), *shape(nodes[0])[1:]), dtype=graph.dtype_of(parameters[0]), device="meta")
    return graph.add_parameter(name, Stacked(tuple(graph.values[p] for p in parameters), heights), like)


merge_linears = Rewrite(
    "merge_linears",
    Exactness.ALGEBRAIC,
    sites,
    change,
    forms=(TAUT,),
    order=5,
    absent="no two linear layers read the same value",
)
