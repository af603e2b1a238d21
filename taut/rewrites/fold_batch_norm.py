"""Fold a batch norm with fixed statistics into the linear or convolution layer in front of it, or else behind it.

    (x W^T + c - mean) a + b,  a = gain / sqrt(variance + eps)   =   x (diag(a) W)^T + ((c - mean) a + b)

Any window, stride, padding and grouping will do in front, for what is scaled is the layer's output. Where another op
stands there (a pre-activation block), the layers that read the norm take it instead, as they take any gain and bias;
one that pads its input cannot, for the norm's zero is not zero. A layer without a bias gets one.

Source: Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167, algorithm 2; for transformers: Song et al.,
FusionFormer: fusing operations in transformer for efficient streaming speech recognition, 2022, arXiv:2210.17079.
Differs: layers are found by data flow, through transposes and reshapes, and layers behind the norm are covered.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from taut.facts.contraction import CONVOLUTIONS, Contraction, line_along, name_of, place, uses
from taut.facts.gains import gain_of
from taut.facts.moves import is_move, move
from taut.facts.readers import Reader, readers
from taut.graph import Graph, is_getitem, shape
from taut.lift._match import is_call, through_casts
from taut.ops.linear import linear
from taut.rewrite import TAUT, Exactness, Form, Rewrite, Site
from taut.values import Filled, InverseRoot, Original, Pick, Scaled, Shifted, Sum, Value

aten = torch.ops.aten
CHANNEL = 1


@dataclass(frozen=True)
class Affine:
    """What a batch norm does to a channel: `(x - mean) * by[0] * by[1] .. + bias`."""

    mean: Value
    by: tuple[Value, ...]
    bias: Value | None

    def scaled(self, x: Value, axis: int) -> Value:
        for by in self.by:
            x = Scaled(x, by, axis)
        return x

    def of(self, x: Value) -> Value:
        """The norm of a vector, one element a channel."""
        x = self.scaled(Sum(x, self.mean, -1.0), 0)
        return x if self.bias is None else Sum(x, self.bias)


@dataclass
class Fold:
    """`becomes` by parameter, `through` the layers that may use it, and new biases by layer."""

    norm: fx.Node
    becomes: dict[str, Value] = field(default_factory=dict)
    through: dict[str, set[fx.Node]] = field(default_factory=dict)
    biases: dict[fx.Node, Value] = field(default_factory=dict)

    def claim(self, parameter: str, value: Value, node: fx.Node) -> str | None:
        self.through.setdefault(parameter, set()).add(node)
        if self.becomes.setdefault(parameter, value) != value:
            return f"{parameter} is read twice, in different ways"
        return None


def sites(graph: Graph, form: Form) -> list[Site]:
    used = uses(graph)
    return [_site(norm, _fold(graph, norm, used)) for norm in graph.calls(aten.batch_norm.default)]


def _site(norm: fx.Node, fold: Fold | str) -> Site:
    where = norm.meta["where"] or norm.name
    return Site(where, fold) if isinstance(fold, str) else Site(where, writes=tuple(fold.becomes), detail=fold)


def _fold(graph: Graph, norm: fx.Node, used: dict[str, set[fx.Node]]) -> Fold | str:
    affine = _affine(graph, norm)
    if isinstance(affine, str):
        return affine
    fold = _into_writer(graph, norm, affine)
    if isinstance(fold, str):
        behind = _into_readers(graph, norm, affine)
        fold = f"{fold}, and {behind}" if isinstance(behind, str) else behind
    if isinstance(fold, str):
        return fold
    for parameter, nodes in fold.through.items():
        others = used[parameter] - nodes
        if others:
            return f"{parameter} is also read by {name_of(min(others, key=lambda n: n.name))}"
    return fold


def _affine(graph: Graph, norm: Any) -> Affine | str:
    _, gain, bias, mean, variance, training, _, eps, *_ = norm.args
    mean, variance = through_casts(mean), through_casts(variance)
    if training or mean is None or variance is None:
        return "it takes its statistics from the batch"
    if any(node.op != "placeholder" or node.meta["kind"] == "input" for node in (mean, variance)):
        return "its statistics are computed"
    parts = [None if part is None else gain_of(graph, part) for part in (gain, bias)]
    for part in parts:
        if isinstance(part, str):
            return part
    own = [None if part is None else part.value(graph) for part in parts if not isinstance(part, str)]
    inverse = InverseRoot(_stored(graph, variance), eps)
    return Affine(_stored(graph, mean), (inverse,) if own[0] is None else (own[0], inverse), own[1])


def _stored(graph: Graph, node: fx.Node) -> Value:
    name = node.meta["tensor"]
    return graph.values.get(name, Original(name))


def _into_writer(graph: Graph, norm: fx.Node, affine: Affine) -> Fold | str:
    """The layer whose output, perhaps moved, the norm alone reads."""
    channels = shape(norm)[CHANNEL]
    layer, moves = _behind(norm)
    if not is_call(layer, linear, *CONVOLUTIONS):
        return f"it reads {_said(layer)}"
    path = {norm, *moves}
    others = [user for node in (layer, *moves) for user in _value_users(node) if user not in path]
    if others:
        return f"what it reads is also read by {name_of(others[0])}"
    index: Any = torch.arange(shape(layer)[_out_axis(layer)], dtype=torch.int32)
    index = index.view([-1 if a == _out_axis(layer) else 1 for a in range(len(shape(layer)))]).expand(shape(layer))
    for node in reversed(moves):
        index = None if index is None else move(node, index)
    line = None if index is None else line_along(index, CHANNEL)
    if line is None or line.tolist() != list(range(channels)):
        return f"its channels are not the outputs of {name_of(layer)}"
    fold = Fold(norm)
    reason = _take_rows(graph, fold, layer, affine)
    return reason or fold


def _behind(norm: Any) -> tuple[Any, list[fx.Node]]:
    """The node behind movements of its input, and those movements."""
    node, moves = norm.args[0], []
    while is_move(node) and not is_getitem(node):
        moves.append(node)
        node = node.args[0]
    return node, moves


def _value_users(node: fx.Node) -> list[fx.Node]:
    """Who reads more of a node than its shape."""
    return [user for user in node.users if user.target is not aten.reshape_as.default or user.args[0] is node]


def _said(node: fx.Node) -> str:
    return f"the {node.meta['kind']} {node.meta['tensor']}" if node.op == "placeholder" else name_of(node)


def _take_rows(graph: Graph, fold: Fold, layer: Any, affine: Affine) -> str | None:
    weight, bias = layer.args[1], (*layer.args, None)[2]
    spot = place(graph, weight, 0)
    if layer.kwargs or (layer.args[3:] and layer.target is linear):
        return f"{name_of(layer)} has options that it cannot be folded into"
    if isinstance(spot, str) or spot.order is not None:
        return f"the weight of {name_of(layer)} is not laid out as its outputs"
    reason = fold.claim(spot.parameter, affine.scaled(graph.values[spot.parameter], spot.axis), layer)
    if bias is None:
        fold.biases[layer] = affine.of(Filled((shape(weight)[0],), 0.0))
        return reason
    own = place(graph, bias, 0)
    if isinstance(own, str) or own.order is not None:
        return f"the bias of {name_of(layer)} is not laid out as its outputs"
    return reason or fold.claim(own.parameter, affine.of(graph.values[own.parameter]), layer)


def _into_readers(graph: Graph, norm: fx.Node, affine: Affine) -> Fold | str:
    """Every layer that reads the norm takes its factor along the input, and its offset into the bias."""
    channels, ndim = shape(norm)[CHANNEL], len(shape(norm))
    found = readers(graph, norm, (channels, *[1] * (ndim - 1 - CHANNEL)))
    if isinstance(found, str):
        return found
    fold, offset = Fold(norm), affine.of(Filled((channels,), 0.0))
    for reader in found:
        reason = _unable(reader) or _take_columns(graph, fold, reader, affine, offset)
        if reason is not None:
            return reason
    return fold


def _unable(reader: Reader) -> str | None:
    product = reader.contraction
    if product.padded:
        return f"{name_of(product.node)}, which reads it, pads its input with zeros"
    takes = is_call(product.node, linear, *CONVOLUTIONS) and not product.node.kwargs
    if product.depthwise or reader.gain_only or not takes:
        return f"{name_of(product.node)}, which reads it, cannot take an offset"
    return None


def _take_columns(graph: Graph, fold: Fold, reader: Reader, affine: Affine, offset: Value) -> str | None:
    product: Contraction = reader.contraction
    spot, kept = place(graph, product.weight, product.axis), place(graph, product.weight, product.keep)
    if isinstance(spot, str) or isinstance(kept, str) or spot.order is not None or kept.order is not None:
        return f"the weight of {name_of(product.node)} is not laid out as its inputs"
    if len(reader.features) != shape(product.weight)[product.axis]:
        return f"{name_of(product.node)} reads it in part"
    weight, order = graph.values[spot.parameter], reader.features
    picked = Affine(affine.mean, tuple(Pick(by, order) for by in affine.by), affine.bias)
    reason = fold.claim(spot.parameter, picked.scaled(weight, spot.axis), product.node)
    shift = Pick(offset, order)
    if product.bias is None:
        rows = Filled((shape(product.weight)[product.keep],), 0.0)
        fold.biases[product.node] = Shifted(rows, weight, shift, spot.axis, kept.axis)
        return reason
    own = place(graph, product.bias, 0)
    if isinstance(own, str) or own.order is not None:
        return f"the bias of {name_of(product.node)} is not laid out as its outputs"
    shifted = Shifted(graph.values[own.parameter], weight, shift, spot.axis, kept.axis)
    return reason or fold.claim(own.parameter, shifted, product.node)


def change(graph: Graph, chosen: list[Site]) -> None:
    for site in chosen:
        fold: Fold = site.detail
        graph.values.update(fold.becomes)
        for layer, value in fold.biases.items():
            _add_bias(graph, layer, value)
        source: Any = fold.norm.args[0]
        fold.norm.replace_all_uses_with(source)
        graph.fx.erase_node(fold.norm)


def _add_bias(graph: Graph, layer: Any, value: Value) -> None:
    weight = layer.args[1]
    spot = place(graph, weight, 0)
    assert not isinstance(spot, str)
    name = f"{spot.parameter.rpartition('.')[0] or layer.name}.bias"
    like = torch.empty(shape(layer)[_out_axis(layer)], dtype=graph.dtype_of(spot.parameter), device="meta")
    layer.args = (*layer.args[:2], graph.add_parameter(name, value, like), *layer.args[3:])


def _out_axis(layer: fx.Node) -> int:
    weight: Any = layer.args[1]
    return len(shape(layer)) - 1 if layer.target is linear else len(shape(layer)) - len(shape(weight)) + 1


fold_batch_norm = Rewrite(
    "fold_batch_norm",
    Exactness.ALGEBRAIC,
    sites,
    change,
    forms=(TAUT,),
    order=1,
    absent="the model has no batch norm",
)
