"""Scale a norm's input by a static power of two, so that its sum of squares fits float16.

    rms_norm(x, e)  =  rms_norm(c x, c^2 e)        c = 2^-round(log2(kappa)),  never above one

kappa follows from the weights between the previous norm, whose output has a known length, and this one:

    behind attention     |(O V_rep + I) diag(g)|_F                     V_rep: V's heads, repeated for their queries
    behind a plain MLP   mean|g| |A|_2 |B|_2
    behind a GLU         |D (U diag(g))|_F |G diag(g)|_2

It is the length of what one block adds (attention counts the stream as one more unit), not of the stream, which grows
with every block: it lowers the sum of squares and does not bound it. `calibrate` measures the stream instead, at every
norm. Either way the model is the same function.

Source: Salmani, Trukhanov and Soloveychik, SLaNC: static LayerNorm calibration, 2024, arXiv:2410.10553.
Differs: c is a power of two, so that nothing is rounded, and never above one, which would only bring overflow nearer;
heads of V are repeated one by one for grouped queries, where the authors' code repeats them all together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from dataclasses import replace as with_
from typing import Any

import torch
from torch import Tensor, fx

from taut.facts.gains import gain_of
from taut.facts.moves import is_move, move
from taut.graph import Graph, is_getitem, shape
from taut.lift._match import is_call, through_casts
from taut.ops.attention import attention
from taut.ops.glu import glu
from taut.ops.layer_norm import layer_norm
from taut.ops.linear import linear
from taut.ops.rms_norm import rms_norm
from taut.rewrite import TAUT, Exactness, Form, Rewrite, Site
from taut.values import Filled, Read, Rows, Value

aten = torch.ops.aten
NORMS = (rms_norm, layer_norm)


@dataclass(frozen=True)
class Weight:
    """A linear layer's weight as (out, in), or some of its rows: a parameter, perhaps stored the other way round."""

    value: Value
    turned: bool
    rows: tuple[int, ...] | None = None

    def evaluate(self, read: Read) -> Tensor:
        weight = self.value.evaluate(read)
        weight = weight.mT if self.turned else weight
        return weight if self.rows is None else weight[list(self.rows)]


@dataclass(frozen=True)
class Scale(Value):
    """c for a norm: the power of two nearest to the inverse of `length`, at most one, a scalar."""

    kind: str
    weights: tuple[Weight, ...]
    gain: Value | None
    heads: tuple[int, int] = (1, 1)

    def evaluate(self, read: Read, rows: Rows = None) -> Tensor:
        return power_of_two(max(1.0, self.length(read)))

    def length(self, read: Read) -> float:
        """kappa."""
        first, *others = [weight.evaluate(read) for weight in self.weights]
        gain = torch.ones(first.shape[1], dtype=torch.float64) if self.gain is None else self.gain.evaluate(read)
        if self.kind == "attention":
            queries, keys = self.heads
            repeated = first.unflatten(0, (keys, -1)).repeat_interleave(queries // keys, 0).flatten(0, 1)
            return ((others[0] @ repeated + torch.eye(len(others[0]), dtype=torch.float64)) * gain).norm().item()
        if self.kind == "glu":
            gate, down = others
            return (down @ (first * gain)).norm().item() * _largest(gate * gain)
        return gain.abs().mean().item() * _largest(first) * _largest(others[0])

    def children(self) -> tuple[Value, ...]:
        return (*(weight.value for weight in self.weights), *(() if self.gain is None else (self.gain,)))


def power_of_two(length: float) -> Tensor:
    """2^-round(log2(length)), in float64, a scalar."""
    return torch.tensor(2.0 ** -round(math.log2(length)), dtype=torch.float64)


def _largest(matrix: Tensor) -> float:
    """The spectral norm, from the smaller of the two Gram matrices."""
    gram = matrix @ matrix.mT if len(matrix) < matrix.shape[1] else matrix.mT @ matrix
    return torch.linalg.eigvalsh(gram)[-1].clamp_min(0).sqrt().item()


def sites(graph: Graph, form: Form) -> list[Site]:
    found = []
    for norm in graph.calls(*NORMS):
        where = norm.meta["where"] or norm.name
        scale = _scale(graph, norm)
        if isinstance(scale, str):
            found.append(Site(where, scale))
        else:
            found.append(Site(where, writes=(_name(norm),), detail=(norm, scale)))
    return found


def _name(norm: fx.Node) -> str:
    return f"{norm.meta['where'] or norm.name}.input_scale"


def _scale(graph: Graph, norm: Any) -> Scale | str:
    """What the weights say about the length of a norm's input, or in words why they say nothing."""
    if isinstance(norm.args[-1], fx.Node):
        return "its epsilon is computed for every token"
    total = through_casts(norm.args[0])
    if not is_call(total, aten.add.Tensor):
        return "nothing is added to the stream in front of it: its scale stays one"
    for term in total.args[:2]:
        writer = _back(term)
        if is_call(writer, linear):
            scale = _behind_attention(graph, writer) or _behind_mlp(graph, writer)
            if scale is not None:
                return scale
    return "what is added in front of it is neither attention nor a feed-forward layer between linear layers"


def _back(node: Any) -> Any:
    """The node behind casts and movements of tokens."""
    while isinstance(node, fx.Node) and is_move(node) and not is_getitem(node):
        node = node.args[0]
    return node


def _behind_attention(graph: Graph, out: Any) -> Scale | None:
    mixed: Any = _back(out.args[0])
    if not is_call(mixed, attention) or shape(mixed)[1] * shape(mixed)[3] != shape(out.args[0])[-1]:
        return None
    v: Any = mixed.args[2]
    value, rows = _values(v)
    if rows is None:
        return None
    norm: Any = _back(value.args[0])
    weights = _weights(graph, value, out) if is_call(norm, *NORMS) else None
    gain = None if weights is None else _gain(graph, norm)
    if weights is None or isinstance(gain, str) or shape(norm)[-1] != shape(out)[-1]:
        return None
    weights = (with_(weights[0], rows=rows), *weights[1:])
    return Scale("attention", weights, gain, (shape(mixed)[1], shape(v)[1]))


def _values(v: Any) -> tuple[Any, tuple[int, ...] | None]:
    """The linear layer that makes the values, and which of its outputs they are, head by head."""
    node: Any = v
    chain: list[fx.Node] = []
    while isinstance(node, fx.Node) and is_move(node):
        chain.append(node)
        node = node.args[0]
    if not is_call(node, linear):
        return node, None
    size = tuple(node.meta["val"].shape)
    index: Any = torch.arange(size[-1]).expand(size)
    for step in reversed(chain):
        index = None if index is None else move(step, index)
    if index is None or index.ndim != 4 or not bool((index == index[:1, :, :1]).all()):
        return node, None
    return node, tuple(index[0, :, 0].flatten().tolist())


def _behind_mlp(graph: Graph, out: Any) -> Scale | None:
    inner = _back(out.args[0])
    if is_call(inner, glu):
        gate, up = (_back(arg) for arg in inner.args[:2])
        layers, kind = (up, gate, out), "glu"
    else:
        first = _activated(inner)
        if first is None:
            return None
        layers, kind = (first, out), "plain"
    if not all(is_call(layer, linear) for layer in layers):
        return None
    if {shape(node)[-1] for node in (*layers[:-1], out.args[0])} != {shape(inner)[-1]}:
        return None  # a part of it is taken on the way
    norms = {_back(layer.args[0]) for layer in layers[:-1]}
    norm = norms.pop()
    weights = _weights(graph, *layers) if not norms and is_call(norm, *NORMS) else None
    gain = None if weights is None else _gain(graph, norm)
    return None if weights is None or isinstance(gain, str) else Scale(kind, weights, gain)


def _activated(node: Any) -> fx.Node | None:
    """The linear layer that a value is a function of, element by element; None where there is more to it."""
    found: set[fx.Node] = set()
    todo, seen = [node], set()
    while todo:
        one = _back(todo.pop())
        if is_call(one, linear):
            found.add(one)
        elif one.op != "call_function" or shape(one) != shape(node) or is_call(one, *NORMS, attention):
            return None
        elif one not in seen:
            seen.add(one)
            todo += one.all_input_nodes
    return found.pop() if len(found) == 1 and seen else None


def _weights(graph: Graph, *layers: Any) -> tuple[Weight, ...] | None:
    """The layers' weights, where each is a whole parameter, perhaps transposed."""
    found = []
    for layer in layers:
        node = through_casts(layer.args[1])
        turned = is_call(node, aten.transpose.int, aten.t.default, aten.mT.default)
        node = through_casts(node.args[0]) if turned else node
        if node.op != "placeholder" or node.meta["kind"] != "parameter" or layer.args[3:]:
            return None
        found.append(Weight(graph.values[node.meta["tensor"]], turned))
    return tuple(found)


def _gain(graph: Graph, norm: Any) -> Value | str | None:
    if norm.args[1] is None:
        return None
    gain = gain_of(graph, norm.args[1])
    return gain if isinstance(gain, str) else gain.value(graph)


def change(graph: Graph, chosen: list[Site]) -> None:
    for site in chosen:
        _put(graph, *site.detail)


def _put(graph: Graph, norm: Any, scale: Value) -> None:
    """Multiply a norm's input by c and its epsilon by c^2."""
    x, *parts, eps = norm.args
    c = graph.add_parameter(_name(norm), scale, torch.empty((), dtype=torch.float32, device="meta"))
    scaled = graph.insert(aten.mul.Tensor, (x, c), norm)
    square = graph.insert(aten.mul.Tensor, (graph.insert(aten.square.default, (c,), norm), eps), norm)
    norm.args = (scaled, *parts, square)


def calibrate(graph: Graph, inputs: Iterable[Mapping[str, Tensor]]) -> Graph:
    """A copy with every norm's input scaled to a length of about one for the longest token of the inputs.

    Norms with an epsilon per token are left alone. Raises ValueError without inputs.
    """
    scaled = graph.copy()
    norms = [norm for norm in scaled.calls(*NORMS) if not isinstance(norm.args[-1], fx.Node)]
    longest = _longest(scaled, set(norms), inputs)
    for norm in norms:
        _put(scaled, norm, Filled((), power_of_two(longest[norm]).item()))
    scaled.fx.lint()
    return scaled


def _longest(graph: Graph, norms: set[fx.Node], inputs: Iterable[Mapping[str, Tensor]]) -> dict[fx.Node, float]:
    found: dict[fx.Node, float] = {}

    def watch(node: fx.Node, value: Any, value_of: Any) -> Any:
        if node in norms:
            source: Any = node.args[0]
            found[node] = max(found.get(node, 0.0), value_of(source).norm(dim=-1).max().item())
        return value

    for example in inputs:
        with torch.no_grad():
            graph.run(example, float64=True, watch=watch)
    if norms and not found:
        raise ValueError("calibration needs at least one example")
    return found


static_norm_scale = Rewrite(
    "static_norm_scale",
    Exactness.ALGEBRAIC,
    sites,
    change,
    forms=(TAUT,),
    asked=True,
    order=8,
    absent="the model has no norm",
)
