"""Gated linear units: an activation of one half times the other.

Which activation it is, is found by running it: however it is spelled, it must agree to the last bits of float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from taut.graph import Float64, Graph, shape
from taut.lift._match import is_call, is_cast, replace, through_casts
from taut.ops._activation import ACTIVATIONS
from taut.ops.glu import glu

ORDER = 2
aten = torch.ops.aten
NAMES = ("silu", "gelu", "gelu_tanh", "relu", "sigmoid", "relu2")
ELEMENTWISE = (
    aten.silu.default,
    aten.gelu.default,
    aten.relu.default,
    aten.sigmoid.default,
    aten.tanh.default,
    aten.erf.default,
    aten.square.default,
    aten.pow.Tensor_Scalar,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.add.Tensor,
)
LONGEST = 12
"""Calls in the longest spelling of an activation that is tried."""
STEEPEST = 64.0
"""Largest product of the factors in it: a steeper function could be another one between the points tried."""


def lift(graph: Graph) -> None:
    tried: dict[fx.Node, tuple[str, fx.Node] | None] = {}
    for node in list(graph.nodes):
        if not is_call(node, aten.mul.Tensor) or not all(isinstance(arg, fx.Node) for arg in node.args):
            continue
        args: Any = node.args
        for active, up in (args, args[::-1]):
            found = named_activation(active, tried)
            if found is not None and _is_gate(node, found[1], up):
                replace(graph, node, glu, (found[1], up, found[0]))
                break


def _is_gate(node: fx.Node, gate: fx.Node, up: fx.Node) -> bool:
    """Both halves are whole, and not functions of one value: x sigmoid(1.7 x) is an activation."""
    real = gate.meta["val"].is_floating_point()
    return real and shape(gate) == shape(up) == shape(node) and len(shape(node)) > 1 and _only_source(node) is None


def named_activation(node: Any, tried: dict[fx.Node, tuple[str, fx.Node] | None]) -> tuple[str, fx.Node] | None:
    """The name of the activation that a node computes, and what of."""
    node = through_casts(node)
    if not is_call(node, *ELEMENTWISE):
        return None
    if node not in tried:
        tried[node] = next((found for x in _sources(node) if (found := _named(node, x)) is not None), None)
    return tried[node]


def _only_source(node: fx.Node) -> fx.Node | None:
    """The nearest node of which the expression that ends here is a function."""
    return next(_sources(node), None)


def _sources(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes of which the expression that ends here is a function, the nearest first."""
    edge = {node}
    for _ in range(LONGEST):
        last = max(edge)
        if not is_call(last, *ELEMENTWISE) and not is_cast(last):
            return
        edge = (edge - {last}) | set(last.all_input_nodes)
        if len(edge) == 1 and not is_cast(next(iter(edge))):
            yield next(iter(edge))


def _named(node: fx.Node, x: fx.Node) -> tuple[str, fx.Node] | None:
    far, near = torch.logspace(1.0, 4.0, 31, dtype=torch.float64), torch.logspace(-30.0, -1.0, 88, dtype=torch.float64)
    points = torch.cat((torch.linspace(-8.0, 8.0, 257, dtype=torch.float64), far, -far))
    near = torch.cat((near, -near))
    done: dict[fx.Node, Tensor] = {}
    with Float64():
        values, close = _at(node, x, points, done), _at(node, x, near, {})
    if not all(_is_smooth(inner, x) for inner in done) or math.prod(map(_factor, done)) > STEEPEST:
        return None
    for name in NAMES:
        alike = torch.allclose(values, ACTIVATIONS[name](points), rtol=1e-14, atol=1e-15)
        if alike and torch.allclose(close, ACTIVATIONS[name](near), rtol=1e-14, atol=0.0):
            return name, x
    return None


def _is_smooth(node: fx.Node, x: fx.Node) -> bool:
    """Whether a step of an activation has no kink and no pole but at zero: it might lie between the points tried."""
    if is_call(node, aten.relu.default):
        return through_casts(node.args[0]) is x
    if is_call(node, aten.pow.Tensor_Scalar):
        return node.args[1] in (2, 3)
    return not is_call(node, aten.div.Tensor) or isinstance(node.args[1], int | float)


def _factor(node: fx.Node) -> float:
    """By how much a step multiplies, at the least 1."""
    number = next((abs(arg) for arg in node.args if isinstance(arg, int | float)), 1.0)
    if is_call(node, aten.div.Tensor):
        number = 1.0 / number if number else math.inf
    return max(1.0, number) if is_call(node, aten.mul.Tensor, aten.div.Tensor) else 1.0


def _at(node: Any, x: fx.Node, points: Tensor, done: dict[fx.Node, Tensor]) -> Tensor:
    if node is x:
        return points
    if node not in done:
        if is_cast(node):
            done[node] = _at(node.args[0], x, points, done)
        else:
            args = fx.map_arg(node.args, lambda n: _at(n, x, points, done))
            target: Any = node.target
            done[node] = target(*args, **node.kwargs)
    return done[node]
