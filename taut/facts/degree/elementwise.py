"""Rules for ops that make each element of the elements in its place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from taut.facts.degree.records import Scaled, Step
from taut.facts.degree.walk import NOT_PROPORTIONAL, Walk, args, common
from taut.graph import shape

aten = torch.ops.aten

ADDS = (aten.add.Tensor, aten.sub.Tensor)
EXPONENTS = {aten.square.default: 2, aten.reciprocal.default: -1, aten.sqrt.default: 0.5, aten.rsqrt.default: -0.5}
HOMOGENEOUS = {"relu": 1, "relu2": 2, "identity": 1}


def keep(walk: Walk, node: fx.Node) -> Scaled | str:
    """f(s x) = s f(x) for s > 0, or nothing but a rotation of features; no other argument may carry a scalar."""
    x: Any = args(node)[0]
    at = walk.at(x)
    if at is None or walk.sources(node) != [x] or len(shape(node)) > len(shape(x)):
        return NOT_PROPORTIONAL
    return replace(at, step=Step((x,)))


def keep_if_zero(walk: Walk, node: fx.Node) -> Scaled | str:
    """Zero is any scalar times zero: max(x, 0), and masking with zeros."""
    *_, last = args(node)
    plain = not node.kwargs and not (node.target is aten.clamp.default and len(args(node)) != 2)
    return keep(walk, node) if plain and not isinstance(last, fx.Node) and last == 0 else NOT_PROPORTIONAL


def power(walk: Walk, node: fx.Node) -> Scaled | str:
    target: Any = node.target
    exponent: Any = EXPONENTS.get(target) or args(node)[1]
    kept = keep(walk, node)
    if isinstance(kept, str) or isinstance(exponent, fx.Node):
        return NOT_PROPORTIONAL
    degree = kept.degree * exponent
    return replace(kept, degree=int(degree)) if degree == int(degree) else NOT_PROPORTIONAL


def rope(walk: Walk, node: fx.Node) -> Scaled | str:
    result = keep(walk, node)
    if not isinstance(result, str) and result.ids.shape[-1] != 1:
        return "mixes features with different scalars"
    return result


def times(walk: Walk, node: fx.Node) -> Scaled | str:
    left, right = args(node)[:2]
    sign = -1 if node.target is aten.div.Tensor else 1
    degree = walk.degree(left) + sign * walk.degree(right)
    return common(walk, node, [x for x in (left, right) if walk.at(x)], degree)


def same(walk: Walk, node: fx.Node) -> Scaled | str:
    """Sums, and choices between values: all must carry the same scalar to the same power."""
    operands = args(node)[1:3] if node.target is aten.where.self else args(node)[:2]
    if any(walk.at(x) is None for x in operands):
        return "adds a value that does not scale" if node.target in ADDS else "joins values that scale differently"
    if len({walk.degree(x) for x in operands}) != 1:
        return "adds values that scale differently"
    return common(walk, node, list(operands), walk.degree(operands[0]))


def glu(walk: Walk, node: fx.Node) -> Scaled | str | None:
    gate, up = args(node)[:2]
    act: Any = (*args(node), node.kwargs.get("act", "silu"))[2]
    degree, operands = walk.degree(up), [up] if walk.at(up) else []
    if walk.at(gate) and act in HOMOGENEOUS:
        degree, operands = degree + HOMOGENEOUS[act] * walk.degree(gate), [gate, *operands]
    elif walk.at(gate) and gate is not up:
        walk.stop(node, gate, f"has {act} in it")
    elif walk.at(gate):
        return f"has {act} in it"
    return common(walk, node, operands, degree) if operands else None
