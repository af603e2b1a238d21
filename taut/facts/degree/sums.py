"""Rules for ops that sum or rank along an axis, which may hold the scalar of one token alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from taut.facts.contraction import CONVOLUTIONS, Contraction
from taut.facts.degree.elementwise import keep
from taut.facts.degree.records import Absorber, Scaled, Step
from taut.facts.degree.walk import NOT_PROPORTIONAL, Walk, args, common
from taut.graph import shape
from taut.ops.linear import linear

aten = torch.ops.aten

ARGS = (aten.argmax.default, aten.argmin.default, aten.argsort.default)
RANKS = (aten.topk.default, aten.sort.default)


def contract(walk: Walk, product: Contraction) -> Scaled | str | None:
    node, at = product.node, walk.at(product.x)
    if at is None or walk.sources(node) != [product.x]:
        return NOT_PROPORTIONAL
    if at.ids.shape[product.x_axis] != 1:
        return "sums over values with different scalars"
    if node.target in CONVOLUTIONS and not _pointwise(product):
        return "has a window over several tokens"
    result = common(walk, node, [product.x], at.degree)
    if isinstance(result, str):
        return result
    result = replace(result, behind=True)
    if product.bias is None:
        return result
    if node.target is not linear:
        return "adds a bias"
    walk.found.scaled[node] = result
    walk.stop(node, node, "adds a bias", before_bias=True)
    return None


def _pointwise(product: Contraction) -> bool:
    """Whether each token of the result is made of the one token in its place."""
    before, after = shape(product.x)[product.x_axis + 1 :], shape(product.node)[product.out_axis + 1 :]
    return not product.padded and all(size == 1 for size in shape(product.weight)[2:]) and before == after


def token_product(walk: Walk, node: fx.Node) -> Scaled | str:
    """A product of two activations: each may carry a scalar, but not along the axis that is summed."""
    if any(len(shape(x)) < 2 for x in args(node)[:2]):
        return "is a product with a vector"
    operands = [(x, axis) for x, axis in zip(args(node)[:2], (-1, -2), strict=True) if walk.at(x)]
    for x, axis in operands:
        ids = walk.found.scaled[x].ids
        if ids.ndim < 2 or ids.shape[axis] != 1:
            return "sums over the scalars of different tokens"
    return common(walk, node, [x for x, _ in operands], sum(walk.degree(x) for x, _ in operands))


def reduce(walk: Walk, node: fx.Node) -> Scaled | str:
    x: Any = args(node)[0]
    kept = keep(walk, node)
    if isinstance(kept, str):
        return kept
    axes: Any = (*args(node), None)[1]
    axes = list(range(len(shape(x)))) if axes in (None, []) else axes if isinstance(axes, list | tuple) else [axes]
    if any(kept.ids.shape[axis] != 1 for axis in axes):
        return "mixes the scalars of different tokens"
    if node.kwargs.get("keepdim", (*args(node), False, False)[2]):
        return kept
    squeezed = kept.ids.squeeze(tuple(axes))
    return replace(kept, ids=squeezed, step=Step((x,), ((aten.squeeze.dims, (list(axes),), {}),)))


def rank(walk: Walk, node: fx.Node) -> Scaled | str | None:
    """Order along the features does not depend on a positive scalar: the places are free of it, the values keep it."""
    at = walk.at(args(node)[0])
    if at is None:
        return NOT_PROPORTIONAL
    places = 2 if node.target is aten.topk.default else 1
    axis: Any = node.kwargs.get("dim", (*args(node), None, None)[places])
    axis = None if axis is None and node.target in ARGS else -1 if axis is None else axis
    if any(at.ids.shape[a] != 1 for a in (range(at.ids.ndim) if axis is None else (axis,))):
        return "ranks values with different scalars"
    return None if node.target in ARGS else keep(walk, node)


def norm(walk: Walk, node: fx.Node) -> str | None:
    x: Any = args(node)[0]
    at = walk.at(x)
    if at is None or walk.sources(node) != [x]:
        return NOT_PROPORTIONAL
    if at.ids.shape[-1] != 1:
        return "normalises over values with different scalars"
    walk.found.absorbers.append(Absorber(node, at.degree))
    return None
