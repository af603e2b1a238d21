"""Centre the weights that read a LayerNorm, so that neither its mean nor its division has to wait for anything.

    ((x - mean(x)) s) W  =  s (x (I - E / d) W)          s = inv_std(x), E all ones

The mean is subtracted once, from the weights, along their inputs; the scalar is put in as `defer_norm` puts it. What
writes x need not be changed, so this also serves tied embeddings and norms behind a block. The mean is still taken, for
the variance, but no product waits for it.

Cost: max(reduction, product) + 1 cycles in place of reduction + scaling + product, on an engine for products beside one
for all the rest (`taut/two_engines.py`): nothing of the reduction shows where the product takes as long.

Source: Salmani and Soloveychik, LLM inference acceleration via efficient operation fusion, 2025, arXiv:2502.17728,
section on LayerNorm.
Differs: the layer's bias is added behind the scalar; how far the scalar gets is decided by data flow. x is multiplied
with its mean in it, so that a mean much larger than the deviation costs digits: it runs only when asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from taut.facts.contraction import name_of, place, uses
from taut.facts.mean import constant_gain
from taut.facts.readers import readers
from taut.graph import Graph, shape
from taut.ops.inv_std import inv_std
from taut.ops.layer_norm import layer_norm
from taut.rewrite import TAUT, Exactness, Form, Rewrite, Site
from taut.rewrites._division import Carrier, absorb, epsilon, leave_out, put_in
from taut.rewrites.defer_norm import Cut, cut_of
from taut.values import Centred

aten = torch.ops.aten


@dataclass
class Centring:
    """One norm, and the axis along which each weight that reads it is centred."""

    norm: fx.Node
    weights: dict[str, int]


def sites(graph: Graph, form: Form) -> list[Site]:
    used = uses(graph)
    found = []
    for norm in graph.calls(layer_norm):
        where = norm.meta["where"] or norm.name
        centring = _centring(graph, norm, used)
        if isinstance(centring, str):
            found.append(Site(where, centring))
        else:
            found.append(Site(where, writes=tuple(centring.weights), detail=centring))
    return found


def _centring(graph: Graph, norm: Any, used: dict[str, set[fx.Node]]) -> Centring | str:
    _, gain, bias, _ = norm.args
    folded = (gain is None or constant_gain(graph, gain) == 1.0) and (bias is None or constant_gain(graph, bias) == 0.0)
    if not folded:
        return "its gain and bias come first: fold_norm takes them"
    if norm.meta["val"].dtype == torch.float16:
        return "float16 has no room for values that are not divided yet"
    found = readers(graph, norm, shape(norm)[-1:])
    if isinstance(found, str):
        return found
    weights: dict[str, int] = {}
    products: set[fx.Node] = set()
    for reader in found:
        product = reader.contraction
        spot = place(graph, product.weight, product.axis)
        if isinstance(spot, str):
            return f"{name_of(product.node)}: {spot}"
        if product.depthwise or sorted(reader.features) != list(range(shape(norm)[-1])):
            return f"{name_of(product.node)} does not sum over all of its features"
        if weights.setdefault(spot.parameter, spot.axis) != spot.axis:
            return f"{spot.parameter} is read twice, in different ways"
        if spot.order is not None and len(spot.order) != graph.tensors[spot.parameter].shape[spot.axis]:
            return f"{spot.parameter} is read only in part"
        products.add(product.node)
    cut = cut_of(graph, norm)
    return cut if isinstance(cut, str) else _owned(graph, Centring(norm, weights), products, used)


def _owned(graph: Graph, centring: Centring, products: set[fx.Node], used: dict[str, set[fx.Node]]) -> Centring | str:
    for parameter in centring.weights:
        others = used[parameter] - products
        if others:
            tied = [name for name in graph.names_of(parameter) if name != parameter]
            also = f" (tied to {', '.join(tied)})" if tied else ""
            return f"{parameter}{also} is also read by {name_of(min(others, key=lambda n: n.name))}"
    return centring


def change(graph: Graph, chosen: list[Site]) -> None:
    for site in chosen:
        centring: Centring = site.detail
        for parameter, axis in centring.weights.items():
            graph.values[parameter] = Centred(graph.values[parameter], axis)
        _put_off(graph, centring.norm, site.where)


def _put_off(graph: Graph, norm: Any, where: str) -> None:
    """Leave the norm's input as it is, and put the scalar in where it is needed."""
    cut: Cut | str = cut_of(graph, norm)
    if isinstance(cut, str):
        raise ValueError(f"center_reader at {where}: {cut}")
    x = norm.args[0]
    carrier = Carrier(graph, cut.found, graph.insert(inv_std, (x, epsilon(norm)), norm))
    put_in(carrier, cut.edges)
    absorb(carrier, cut.absorbers, -2)
    leave_out(graph, norm, x)


center_reader = Rewrite(
    "center_reader",
    Exactness.ALGEBRAIC,
    sites,
    change,
    forms=(TAUT,),
    asked=True,
    order=3,
    absent="the model has no LayerNorm",
)
