"""Scale degree: how far the division of one norm reaches, and where it must be put in if it is left out.

The norm multiplies token i by one scalar, s_i = 1 / sqrt(mean(x_i^2) + eps). Every value behind it carries (k, i): it
equals s_i^k times what it would be without that division. An edge has one degree k; i is said for every element, for
a + roll(a) has equal degrees and the scalars of different tokens. What is not listed here needs degree 0.

Beside each value stands how its scalar, a tensor with one element where the value has many of one token, follows from
the scalar before it. Static sizes serve to find the step; the steps themselves hold none but the model's own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from taut.facts.contraction import CONVOLUTIONS, Contraction, contraction, name_of
from taut.facts.moves import MOVES, is_move, move
from taut.facts.scalars import Call, agree, covers, movements, run
from taut.graph import Graph, shape
from taut.ops.attention import attention
from taut.ops.glu import glu
from taut.ops.layer_norm import layer_norm
from taut.ops.linear import linear
from taut.ops.rms_norm import rms_norm
from taut.ops.rope import rope

aten = torch.ops.aten
NORMS = (rms_norm, layer_norm)


@dataclass(frozen=True)
class Step:
    """The scalar of a value from that of its sources: `calls` one after the other (several sources go in as a list)."""

    sources: tuple[fx.Node, ...]
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True)
class Scaled:
    """A value that carries the scalar to the power `degree`.

    `ids` has the shape of the scalar: it broadcasts to the value, has as many axes, and says per element which of the
    norm's tokens the scalar belongs to (a list of such where the node returns several values). `step` is None at the
    norm itself. `behind` tells whether a product with a parameter lies between the norm and here.
    """

    degree: int
    ids: Any
    step: Step | None
    behind: bool = False


@dataclass(frozen=True)
class Edge:
    """`user` needs `source` times the scalar to the power `degree`, or the model is another function.

    With `before_bias`, `user` is a linear layer, `source` is that layer too, and the scalar belongs between its
    product and its bias.
    """

    user: fx.Node
    source: fx.Node
    degree: int
    reason: str
    behind: bool
    before_bias: bool = False

    def __str__(self) -> str:
        return self.reason if self.user.op == "output" else f"{name_of(self.user)} {self.reason}"


@dataclass(frozen=True)
class Absorber:
    """A norm behind the norm, whose own division makes degree `degree` 0 but for its epsilon."""

    norm: fx.Node
    degree: int


@dataclass
class Reach:
    """How far one norm's scalar reaches: the norms that absorb it, and the frontier where it must be put in."""

    norm: fx.Node
    scaled: dict[fx.Node, Scaled] = field(default_factory=dict)
    absorbers: list[Absorber] = field(default_factory=list)
    frontier: list[Edge] = field(default_factory=list)


def reach(graph: Graph, norm: fx.Node, *, until_product: bool = False) -> Reach:
    """Follow the scalar of a norm through the graph; with `until_product` no farther than the first products."""
    if graph.memo is None:
        return _reach(graph, norm, until_product)
    key = (reach, norm, until_product)
    if key not in graph.memo:
        graph.memo[key] = _reach(graph, norm, until_product)
    return graph.memo[key]


def _reach(graph: Graph, norm: fx.Node, until_product: bool) -> Reach:
    walk = _Walk(Reach(norm), until_product)
    size = shape(norm)[:-1]
    ids = torch.arange(torch.Size(size).numel()).view(*size, 1)
    walk.found.scaled[norm] = Scaled(1, ids, None)
    walk.live.add(norm)
    waiting = set(norm.users)
    for node in graph.nodes:
        if node in waiting:
            walk.visit(node)
            if node in walk.live:
                waiting.update(node.users)
    return walk.found


class _Walk:
    """The values that carry the scalar so far; those in `live` hand it on."""

    def __init__(self, found: Reach, until_product: bool) -> None:
        self.found, self.until_product = found, until_product
        self.live: set[fx.Node] = set()
        self.known: dict[fx.Node, bool] = {}

    def at(self, node: Any) -> Scaled | None:
        return self.found.scaled[node] if isinstance(node, fx.Node) and node in self.live else None

    def sources(self, node: fx.Node) -> list[fx.Node]:
        return [source for source in node.all_input_nodes if source in self.live]

    def visit(self, node: fx.Node) -> None:
        product = contraction(node, self.known)
        if product is not None and product.x in self.live:
            result = _contract(self, product)
        else:
            result = RULES.get("output" if node.op == "output" else node.target, _unknown)(self, node)
        if isinstance(result, str):
            for source in self.sources(node):
                self.stop(node, source, result)
        elif result is not None and result.degree != 0:
            self.found.scaled[node] = result
            if self.until_product and product is not None:
                for user in node.users:
                    self.stop(user, node, "stands behind its product")
            else:
                self.live.add(node)

    def stop(self, user: fx.Node, source: fx.Node, reason: str, before_bias: bool = False) -> None:
        at = self.found.scaled[source]
        self.found.frontier.append(Edge(user, source, at.degree, reason, at.behind, before_bias))


Rule = Callable[[_Walk, fx.Node], "Scaled | str | None"]
"""What a node makes of the scalars it is given: Scaled, None where nothing is left, or why it needs degree 0."""


def _unknown(walk: _Walk, node: fx.Node) -> str:
    return "is not proportional to its input"


def _attention(walk: _Walk, node: fx.Node) -> str:
    return "mixes tokens, each with a scale of its own"


def _shape_only(walk: _Walk, node: fx.Node) -> None:
    return None


def _args(node: fx.Node) -> Any:
    return node.args


def _output(walk: _Walk, node: fx.Node) -> str:
    return "it is an output of the model"


def _keep(walk: _Walk, node: fx.Node) -> Scaled | str:
    """f(s x) = s f(x) for s > 0, or nothing but a rotation of features; no other argument may carry a scalar."""
    x: Any = _args(node)[0]
    at = walk.at(x)
    if at is None or walk.sources(node) != [x] or len(shape(node)) > len(shape(x)):
        return _unknown(walk, node)
    return replace(at, step=Step((x,)))


def _rope(walk: _Walk, node: fx.Node) -> Scaled | str:
    result = _keep(walk, node)
    if not isinstance(result, str) and result.ids.shape[-1] != 1:
        return "mixes features with different scalars"
    return result


def _keep_if_zero(walk: _Walk, node: fx.Node) -> Scaled | str:
    """Zero is any scalar times zero: max(x, 0), and masking with zeros."""
    *_, last = _args(node)
    plain = not node.kwargs and not (node.target is aten.clamp.default and len(_args(node)) != 2)
    return _keep(walk, node) if plain and not isinstance(last, fx.Node) and last == 0 else _unknown(walk, node)


def _power(walk: _Walk, node: fx.Node) -> Scaled | str:
    target: Any = node.target
    exponent: Any = EXPONENTS.get(target) or _args(node)[1]
    kept = _keep(walk, node)
    if isinstance(kept, str) or isinstance(exponent, fx.Node):
        return _unknown(walk, node)
    degree = kept.degree * exponent
    return replace(kept, degree=int(degree)) if degree == int(degree) else _unknown(walk, node)


def _move(walk: _Walk, node: fx.Node) -> Scaled | str:
    source: Any = _args(node)[0]
    at = walk.at(source)
    if at is None or walk.sources(node) != [source] or not is_move(node):
        return _unknown(walk, node)
    wanted = move(node, at.ids.expand(shape(source)))
    if wanted is None:
        return "picks tokens by an index that depends on the input"
    return _stepped(at, (source,), movements(node), at.ids, wanted)


def _item(walk: _Walk, node: fx.Node) -> Scaled | str | None:
    source, index = _args(node)
    at = walk.at(source)
    if at is None or (source.target in RANKS and index == 1):
        return None
    if isinstance(at.ids, list):
        return replace(at, ids=at.ids[index], step=Step((source,), ((operator.getitem, (index,), {}),)))
    return replace(at, step=Step((source,)))


def _join(walk: _Walk, node: fx.Node) -> Scaled | str:
    parts: Any = _args(node)[0]
    ats = [walk.at(part) for part in parts]
    if any(at is None for at in ats) or len({at.degree for at in ats if at is not None}) != 1:
        return "joins values that scale differently"
    found = [at for at in ats if at is not None]
    wholes = [at.ids.expand(shape(part)) for at, part in zip(found, parts, strict=True)]
    target: Any = node.target
    wanted = target(wholes, *_args(node)[1:], **node.kwargs)
    first = replace(found[0], behind=all(at.behind for at in found))
    axis: Any = (*_args(node), 0)[1]
    alike = [()] if target is aten.cat.default else [((aten.unsqueeze.default, (axis,), {}),)]
    result = _stepped(first, (parts[0],), alike, first.ids, wanted)
    if isinstance(result, str):
        joined: list[tuple[Call, ...]] = [((target, tuple(_args(node)[1:]), dict(node.kwargs)),)]
        result = _stepped(first, tuple(parts), joined, [at.ids for at in found], wanted)
    return result


def _times(walk: _Walk, node: fx.Node) -> Scaled | str:
    left, right = _args(node)[:2]
    sign = -1 if node.target is aten.div.Tensor else 1
    degree = _degree_of(walk, left) + sign * _degree_of(walk, right)
    return _common(walk, node, [x for x in (left, right) if walk.at(x)], degree)


def _same(walk: _Walk, node: fx.Node) -> Scaled | str:
    """Sums, and choices between values: all must carry the same scalar to the same power."""
    operands = _args(node)[1:3] if node.target is aten.where.self else _args(node)[:2]
    if any(walk.at(x) is None for x in operands):
        return "adds a value that does not scale" if node.target in ADDS else "joins values that scale differently"
    if len({_degree_of(walk, x) for x in operands}) != 1:
        return "adds values that scale differently"
    return _common(walk, node, list(operands), _degree_of(walk, operands[0]))


def _degree_of(walk: _Walk, x: Any) -> int:
    at = walk.at(x)
    return 0 if at is None else at.degree


def _common(walk: _Walk, node: fx.Node, operands: list[Any], degree: int) -> Scaled | str:
    """The result of an elementwise op on values whose scalars must be the same tokens'."""
    ndim, candidates = len(shape(node)), []
    for source in operands:
        at = walk.found.scaled[source]
        missing = ndim - at.ids.ndim
        calls = ((aten.unsqueeze.default, (0,), {}),) * missing
        ids = at.ids.view(*[1] * missing, *at.ids.shape)
        candidates.append(Scaled(degree, ids, Step((source,), calls), at.behind))
    first = candidates[0]
    if any(not agree(first.ids, other.ids) for other in candidates[1:]):
        return "mixes the scalars of different tokens"
    return replace(first, behind=all(c.behind for c in candidates))


def _reduce(walk: _Walk, node: fx.Node) -> Scaled | str:
    x: Any = _args(node)[0]
    kept = _keep(walk, node)
    if isinstance(kept, str):
        return kept
    axes: Any = (*_args(node), None)[1]
    axes = list(range(len(shape(x)))) if axes in (None, []) else axes if isinstance(axes, list | tuple) else [axes]
    if any(kept.ids.shape[axis] != 1 for axis in axes):
        return "mixes the scalars of different tokens"
    if node.kwargs.get("keepdim", (*_args(node), False, False)[2]):
        return kept
    squeezed = kept.ids.squeeze(tuple(axes))
    return replace(kept, ids=squeezed, step=Step((x,), ((aten.squeeze.dims, (list(axes),), {}),)))


def _rank(walk: _Walk, node: fx.Node) -> Scaled | str | None:
    """Order along the features does not depend on a positive scalar: the places are free of it, the values keep it."""
    at = walk.at(_args(node)[0])
    if at is None:
        return _unknown(walk, node)
    places = 2 if node.target is aten.topk.default else 1
    axis: Any = node.kwargs.get("dim", (*_args(node), None, None)[places])
    axis = None if axis is None and node.target in ARGS else -1 if axis is None else axis
    if any(at.ids.shape[a] != 1 for a in (range(at.ids.ndim) if axis is None else (axis,))):
        return "ranks values with different scalars"
    return None if node.target in ARGS else _keep(walk, node)


def _contract(walk: _Walk, product: Contraction) -> Scaled | str | None:
    node, at = product.node, walk.at(product.x)
    if at is None or walk.sources(node) != [product.x]:
        return _unknown(walk, node)
    if at.ids.shape[product.x_axis] != 1:
        return "sums over values with different scalars"
    if node.target in CONVOLUTIONS and not _pointwise(product):
        return "has a window over several tokens"
    result = _common(walk, node, [product.x], at.degree)
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


def _token_product(walk: _Walk, node: fx.Node) -> Scaled | str:
    """A product of two activations: each may carry a scalar, but not along the axis that is summed."""
    if any(len(shape(x)) < 2 for x in _args(node)[:2]):
        return "is a product with a vector"
    operands = [(x, axis) for x, axis in zip(_args(node)[:2], (-1, -2), strict=True) if walk.at(x)]
    for x, axis in operands:
        ids = walk.found.scaled[x].ids
        if ids.ndim < 2 or ids.shape[axis] != 1:
            return "sums over the scalars of different tokens"
    return _common(walk, node, [x for x, _ in operands], sum(_degree_of(walk, x) for x, _ in operands))


def _glu(walk: _Walk, node: fx.Node) -> Scaled | str | None:
    gate, up = _args(node)[:2]
    act: Any = (*_args(node), node.kwargs.get("act", "silu"))[2]
    degree, operands = _degree_of(walk, up), [up] if walk.at(up) else []
    if walk.at(gate) and act in HOMOGENEOUS:
        degree, operands = degree + HOMOGENEOUS[act] * _degree_of(walk, gate), [gate, *operands]
    elif walk.at(gate) and gate is not up:
        walk.stop(node, gate, f"has {act} in it")
    elif walk.at(gate):
        return f"has {act} in it"
    return _common(walk, node, operands, degree) if operands else None


def _norm(walk: _Walk, node: fx.Node) -> str | None:
    x: Any = _args(node)[0]
    at = walk.at(x)
    if at is None or walk.sources(node) != [x]:
        return _unknown(walk, node)
    if at.ids.shape[-1] != 1:
        return "normalises over values with different scalars"
    walk.found.absorbers.append(Absorber(node, at.degree))
    return None


def _pairs(walk: _Walk, node: fx.Node) -> Scaled | str:
    """Two real features are one complex number, or back."""
    x: Any = _args(node)[0]
    at = walk.at(x)
    if at is None or (node.target is aten.view_as_complex.default and at.ids.shape[-1] != 1):
        return "mixes features with different scalars"
    if node.target is aten.view_as_complex.default:
        return replace(at, ids=at.ids.squeeze(-1), step=Step((x,), ((aten.squeeze.dim, (-1,), {}),)))
    return replace(at, ids=at.ids.unsqueeze(-1), step=Step((x,), ((aten.unsqueeze.default, (-1,), {}),)))


def _stepped(at: Scaled, sources: tuple, candidates: Any, ids: Any, wanted: Any) -> Scaled | str:
    """The first of some ways to move the scalar that leaves it where the movement leaves the value."""
    for calls in candidates:
        result = run(calls, ids)
        if result is not None and covers(result, wanted):
            return replace(at, ids=result, step=Step(sources, calls))
    return "moves tokens in a way that their scalars cannot follow"


ADDS = (aten.add.Tensor, aten.sub.Tensor)
ARGS = (aten.argmax.default, aten.argmin.default, aten.argsort.default)
RANKS = (aten.topk.default, aten.sort.default)
EXPONENTS = {aten.square.default: 2, aten.reciprocal.default: -1, aten.sqrt.default: 0.5, aten.rsqrt.default: -0.5}
HOMOGENEOUS = {"relu": 1, "relu2": 2, "identity": 1}

KEEPS = (aten.neg.default, aten.relu.default, aten.abs.default, aten.leaky_relu.default, aten.prelu.default)
REDUCES = (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default)

SHAPES_ONLY = (
    aten.new_empty.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.empty_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.sym_size.int,
)

RULES: dict[Any, Rule] = {
    "output": _output,
    **dict.fromkeys((attention, aten.scaled_dot_product_attention.default), _attention),
    **dict.fromkeys(SHAPES_ONLY, _shape_only),
    rope: _rope,
    glu: _glu,
    **dict.fromkeys(NORMS, _norm),
    **dict.fromkeys(KEEPS, _keep),
    **dict.fromkeys((aten.clamp_min.default, aten.clamp.default, aten.masked_fill.Scalar), _keep_if_zero),
    **dict.fromkeys((aten.pow.Tensor_Scalar, *EXPONENTS), _power),
    **dict.fromkeys(MOVES, _move),
    operator.getitem: _item,
    **dict.fromkeys((aten.cat.default, aten.stack.default), _join),
    **dict.fromkeys((aten.mul.Tensor, aten.div.Tensor), _times),
    **dict.fromkeys((*ADDS, aten.maximum.default, aten.minimum.default, aten.where.self), _same),
    **dict.fromkeys(REDUCES, _reduce),
    **dict.fromkeys((*RANKS, *ARGS), _rank),
    **dict.fromkeys((aten.matmul.default, aten.bmm.default, aten.mm.default), _token_product),
    **dict.fromkeys((aten.view_as_complex.default, aten.view_as_real.default), _pairs),
}
