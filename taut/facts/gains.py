"""Gains: what a norm multiplies by, as a function of the parameter it is computed from.

Some models multiply by `w`, some by `1 + w`, some cast on the way. The graph is evaluated, widened to float64, at zero,
at one and at random: an elementwise affine function of one parameter is understood, anything else is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from taut.facts.moves import is_move
from taut.graph import Float64, Graph, call, shape
from taut.lift._match import is_call, is_constant
from taut.values import Affine, Filled, Value

aten = torch.ops.aten
QUOTIENTS = (aten.div.Tensor,)
AFFINE = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.neg.default, aten.rsub.Scalar, *QUOTIENTS)


@dataclass(frozen=True)
class Gain:
    """The vector `scale * parameter + offset`, elements in the parameter's own order."""

    parameter: str
    shape: tuple[int, ...]
    scale: float
    offset: float

    @property
    def size(self) -> int:
        return int(torch.Size(self.shape).numel())

    def value(self, graph: Graph) -> Value:
        now = graph.values[self.parameter]
        return now if (self.scale, self.offset) == (1.0, 0.0) else Affine(now, self.scale, self.offset)

    def neutral(self, wanted: float) -> Filled:
        """The parameter for which the vector is `wanted` everywhere."""
        return Filled(self.shape, (wanted - self.offset) / self.scale)


def gain_of(graph: Graph, node: Any) -> Gain | str:
    """The gain that a node computes, or in words why it is not understood."""
    leaves: set[fx.Node] = set()
    if not isinstance(node, fx.Node) or not is_constant(node, {}):
        return "its gain depends on the input"
    _collect(node, leaves)
    if len(leaves) != 1:
        return "its gain is computed from several parameters"
    if not _is_affine(node):
        return "its gain is not an affine function of a parameter"
    leaf = next(iter(leaves))
    size = shape(leaf)
    zero, one = _at(node, leaf, torch.zeros(size)), _at(node, leaf, torch.ones(size))
    trial = torch.linspace(-2.0, 3.0, max(1, int(torch.Size(size).numel())), dtype=torch.float64).view(size)
    there = _at(node, leaf, trial)
    scale, offset = (one - zero), zero
    alike = bool((scale == scale.flatten()[0]).all()) and bool((zero == zero.flatten()[0]).all())
    if there.numel() != trial.numel() or not alike:
        return "its gain is not the same affine function of every element of a parameter"
    expected = scale.flatten()[0] * trial.flatten() + offset.flatten()[0]
    if scale.flatten()[0] == 0 or not torch.allclose(there.flatten(), expected, rtol=1e-12, atol=1e-12):
        return "its gain is not an affine function of a parameter"
    return Gain(leaf.meta["tensor"], size, float(scale.flatten()[0]), float(offset.flatten()[0]))


def _is_affine(node: fx.Node) -> bool:
    """Whether only casts, movements, and sums and products with numbers lie between a parameter and here."""
    if node.op == "placeholder":
        return True
    sources = [arg for arg in node.args if isinstance(arg, fx.Node)]
    divides_by = node.target in QUOTIENTS and sources == [node.args[1]]
    plain = is_call(node, *AFFINE) and len(sources) == 1 and not divides_by
    return (is_move(node) or plain) and _is_affine(sources[0])


def _collect(node: fx.Node, leaves: set[fx.Node]) -> None:
    if node.op == "placeholder":
        leaves.add(node)
    for source in node.all_input_nodes:
        _collect(source, leaves)


def _at(node: fx.Node, leaf: fx.Node, value: Tensor) -> Tensor:
    if node is leaf:
        return value.double()
    with Float64():
        return call(node, lambda source: _at(source, leaf, value), torch.device("cpu"))
