"""Store a stream of mean zero without its last feature, which is minus the sum of the others.

    writers W -> W without its last output;  readers W -> W[:, :-1] - W[:, -1:];  rms_norm -> crms_norm

A norm with a gain per feature, or one that is read by anything but linear layers, gives the last feature back. The
stream must have mean zero already: `center_norm_input` makes it so, and `fold_norm` before it takes the gains.

Source: Jiang, Gu, Zhu and Pan, Pre-RMSNorm and Pre-CRMSNorm Transformers, 2023, arXiv:2305.14858, section 3.2.
Differs: writers and readers are found by data flow. d - 1 features are seldom a good size for a matrix product, so that
this saves memory and operations, not always time: it runs only when asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from taut.facts.contraction import CONVOLUTIONS, contraction, name_of, place, uses
from taut.facts.mean import Means, centred_axes, constant_gain
from taut.facts.moves import RESHAPES
from taut.graph import Graph, call, shape
from taut.lift._match import CASTS, is_call
from taut.ops.crms_norm import crms_norm
from taut.ops.embedding import embedding
from taut.ops.layer_norm import layer_norm
from taut.ops.linear import linear
from taut.ops.rms_norm import rms_norm
from taut.rewrite import TAUT, Exactness, Form, Rewrite, Site
from taut.values import WithoutLast

aten = torch.ops.aten
Place = tuple[fx.Node, int]
"""A node of the stream, with the axis along which its features lie."""

SIZED = (*RESHAPES, aten.expand.default)
TURNS = (aten.transpose.int, aten.permute.default, aten.t.default, aten.mT.default, aten.numpy_T.default)
SHORTENED = {
    *CASTS, *SIZED, *TURNS, *CONVOLUTIONS, linear, embedding, aten.embedding.default,
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default,
    aten.unsqueeze.default, aten.flatten.using_ints, aten.slice.Tensor, aten.select.int, aten.cat.default,
}  # fmt: skip
"""What computes the same for d - 1 features as for d. Their own arguments never pick features: that breaks the mean."""


@dataclass
class Stream:
    """Everything that has the stream's features: nodes, parameters and norms, each with their axis."""

    nodes: dict[fx.Node, int] = field(default_factory=dict)
    writers: dict[str, int] = field(default_factory=dict)
    norms: list[fx.Node] = field(default_factory=list)
    readers: dict[str, int] = field(default_factory=dict)
    refused: str | None = None


def sites(graph: Graph, form: Form) -> list[Site]:
    means, used = Means(graph), uses(graph)
    found: list[Site] = []
    seen: set[fx.Node] = set()
    for norm in graph.calls(rms_norm, layer_norm):
        x: Any = norm.args[0]
        if norm in seen:
            continue
        if means.is_zero(x, len(shape(norm)) - 1) and norm.target is rms_norm:
            stream = _stream(graph, means, norm)
            _find_readers(graph, stream, used)
            seen |= set(stream.norms)
            found.append(_site(graph, norm, stream))
        elif norm.target is layer_norm:
            found.append(Site(_where(norm), "its input is not known to have mean zero: center_norm_input comes first"))
    return found


def _where(norm: fx.Node) -> str:
    return norm.meta["where"] or norm.name


def _site(graph: Graph, norm: fx.Node, stream: Stream) -> Site:
    if stream.refused is not None:
        return Site(_where(norm), stream.refused)
    lost = sum(_per_feature(graph, name, axis) for name, axis in (stream.writers | stream.readers).items())
    note = f"{len(stream.norms)} norms read the stream; {lost} parameters fewer"
    return Site(_where(norm), writes=tuple(sorted(stream.writers | stream.readers)), note=note, detail=stream)


def _per_feature(graph: Graph, parameter: str, axis: int) -> int:
    size = shape(graph.placeholders("parameter")[parameter])
    return torch.Size(size).numel() // size[axis]


def _stream(graph: Graph, means: Means, norm: fx.Node) -> Stream:
    """All that hangs together with a norm's input through the stream's features."""
    found = Stream()
    todo: list[Any] = [(norm.args[0], len(shape(norm)) - 1)]
    while todo and found.refused is None:
        node, axis = todo.pop()
        if node not in found.nodes:
            found.nodes[node] = axis
            todo += _above(graph, means, (node, axis), found) + _below(means, (node, axis), found)
        elif found.nodes[node] != axis:
            found.refused = f"two axes of {name_of(node)} would lose a feature"
    return found


def _above(graph: Graph, means: Means, at: Place, found: Stream) -> list[Any]:
    """The sources of a place; a parameter is a writer."""
    node, axis = at
    if node.op == "placeholder" and node.meta["kind"] == "parameter":
        if axis not in centred_axes(graph.values[node.meta["tensor"]], len(shape(node))):
            found.refused = f"{node.meta['tensor']} is not centred: center_norm_input comes first"
        found.writers[node.meta["tensor"]] = axis
        return []
    sources = means.flow(node, axis)
    if sources is None or not is_call(node, *SHORTENED):
        found.refused = f"its input is written by {name_of(node)}, which cannot leave a feature out"
    return list(sources or [])


def _below(means: Means, at: Place, found: Stream) -> list[Any]:
    """The readers of a place that hand its features on; a norm takes them, anything else refuses."""
    node, axis = at
    onward: list[Any] = []
    for user in node.users:
        along = [b for b in range(len(shape(user))) if at in (means.flow(user, b) or [])]
        if is_call(user, rms_norm) and user.args[0] is node and axis == len(shape(node)) - 1 and along == []:
            found.norms.append(user)
        elif along and isinstance(user.meta["val"], Tensor):
            onward.append((user, along[0]))
        else:
            read = "is an output of the model" if user.op == "output" else f"is also read by {name_of(user)}"
            found.refused = f"{name_of(node)} {read}, which needs every feature"
    return onward


def _find_readers(graph: Graph, stream: Stream, used: dict[str, set[fx.Node]]) -> None:
    """The parameters that can read d - 1 features; a norm with any other reader gives the last one back."""
    stream.norms.sort()
    plain = {norm: found for norm in stream.norms if (found := _linear_readers(graph, norm)) is not None}
    while True:
        layers = {layer for weights in plain.values() for layer in weights.values()}
        shared = [norm for norm, weights in plain.items() if any(used[name] - layers for name, _ in weights)]
        if not shared:
            break
        for norm in shared:
            del plain[norm]
    stream.readers = {name: axis for weights in plain.values() for name, axis in weights}


def _linear_readers(graph: Graph, norm: fx.Node) -> dict[tuple[str, int], fx.Node] | None:
    """Where the input features of every reader's weight lie, or None where the norm must give all features."""
    gain: Any = norm.args[1]
    if gain is not None and constant_gain(graph, gain) != 1.0:
        return None
    found: dict[tuple[str, int], fx.Node] = {}
    for user, x in _reading(norm):
        product = contraction(user, {}) if is_call(user, linear) else None
        spot = None if product is None or product.x is not x else place(graph, product.weight, product.axis)
        if spot is None or isinstance(spot, str) or spot.order is not None or not _only_turned(user.args[1]):
            return None
        found[spot.parameter, spot.axis] = user
    return found or None


def _reading(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Who reads a node past casts and reshapes of its tokens, and what is read."""
    for user in node.users:
        if is_call(user, *CASTS, *SIZED) and user.args[0] is node and shape(user)[-1:] == shape(node)[-1:]:
            yield from _reading(user)
        else:
            yield user, node


def _only_turned(weight: Any) -> bool:
    """Whether a weight is a parameter, perhaps cast or transposed."""
    while is_call(weight, *CASTS, *TURNS):
        weight = weight.args[0]
    return weight.op == "placeholder"


def change(graph: Graph, chosen: list[Site]) -> None:
    for site in chosen:
        stream: Stream = site.detail
        for name, axis in stream.writers.items():
            _shorten(graph, name, WithoutLast(graph.values[name], axis), axis)
        for name, axis in stream.readers.items():
            _shorten(graph, name, WithoutLast(graph.values[name], axis, less=True), axis)
        for node, axis in stream.nodes.items():
            _resize(node, axis)
        for norm in stream.norms:
            _compressed(graph, norm, set(stream.readers))
        _reshape_all(graph)


def _shorten(graph: Graph, name: str, value: WithoutLast, axis: int) -> None:
    node = graph.placeholders("parameter")[name]
    size = list(shape(node))
    size[axis] -= 1
    node.meta["val"] = torch.empty(size, dtype=node.meta["val"].dtype, device="meta")
    graph.values[name] = value


def _resize(node: Any, axis: int) -> None:
    """A size that a movement asks for is one less along the features; -1 stands for whatever is left."""
    if is_call(node, *SIZED):
        source, sizes, *rest = node.args
        sizes = list(sizes)
        sizes[axis] = shape(node)[axis] - 1 if sizes[axis] != -1 else -1
        node.args = (source, sizes, *rest)


def _compressed(graph: Graph, norm: fx.Node, readers: set[str]) -> None:
    """Put a crms_norm in a norm's place."""
    x, gain, eps = norm.args
    whole = not any(_reads(user, readers) for user, _ in _reading(norm))
    if not whole:
        for node in _between(norm):
            _resize(node, len(shape(node)) - 1)
    scaled = gain is not None and constant_gain(graph, gain) != 1.0
    with graph.fx.inserting_before(norm):
        new = graph.fx.call_function(crms_norm, (x, gain if scaled else None, eps, whole))
    new.meta = dict(norm.meta)
    norm.replace_all_uses_with(new)
    graph.fx.erase_node(norm)


def _between(norm: fx.Node) -> set[fx.Node]:
    """The reshapes of tokens between a norm and its readers."""
    found: set[fx.Node] = set()
    for _, last in _reading(norm):
        read: Any = last
        while read is not norm:
            found.add(read)
            read = read.args[0]
    return found


def _reads(user: fx.Node, parameters: set[str]) -> bool:
    if not is_call(user, linear):
        return False
    weight: Any = user.args[1]
    while is_call(weight, *CASTS, *TURNS):
        weight = weight.args[0]
    return weight.meta.get("tensor") in parameters


def _reshape_all(graph: Graph) -> None:
    """Work out again the shape of whatever reads a parameter or the stream."""
    stale = {node for node in graph.nodes if node.op == "placeholder"}
    for node in graph.nodes:
        if node.op == "call_function" and (is_call(node, crms_norm) or not stale.isdisjoint(node.all_input_nodes)):
            before = shape(node)
            node.meta["val"] = call(node, lambda n: n.meta["val"], torch.device("meta"))
            if is_call(node, crms_norm) or shape(node) != before:
                stale.add(node)


compress_centered_stream = Rewrite(
    "compress_centered_stream",
    Exactness.ALGEBRAIC,
    sites,
    change,
    forms=(TAUT,),
    asked=True,
    order=3,
    absent="no norm reads a stream of mean zero",
)
