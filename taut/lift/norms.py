"""Normalisations: RMSNorm and LayerNorm in their several spellings, DyT, group and batch norm."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from taut.graph import Graph, shape
from taut.lift._match import after_casts, is_call, is_cast, is_constant, other, replace, through_casts
from taut.ops.dyt import dyt
from taut.ops.layer_norm import layer_norm
from taut.ops.rms_norm import rms_norm

ORDER = 1
aten = torch.ops.aten


class Core(NamedTuple):
    """A norm before its gain: y = op(x, eps), computed by the node `out`."""

    op: Any
    x: fx.Node
    eps: float
    out: fx.Node


def lift(graph: Graph) -> None:
    known: dict[fx.Node, bool] = {}
    for node in list(graph.nodes):
        args: Any = node.args
        if node.op != "call_function":
            continue
        if node.target is aten.layer_norm.default:
            _native(graph, node, layer_norm, *_native_args(node, 1e-5))
        elif node.target is aten.rms_norm.default:
            x, sizes, gain, eps = args
            _native(graph, node, rms_norm, x, sizes, gain, None, eps)
        elif node.target is aten.tanh.default:
            _dyt(graph, node, known)
        else:
            core = _spelled(node)
            if core is not None:
                _with_gain(graph, core, known)


def _native_args(node: fx.Node, eps: float) -> tuple:
    x, sizes, gain, bias, given = (*node.args, None, None, None)[:5]
    return x, sizes, gain, bias, eps if given is None else given


def _native(graph: Graph, node: fx.Node, op: Any, x: fx.Node, sizes: list, gain, bias, eps: float) -> None:
    if len(sizes) == 1:
        args = (x, gain, bias, eps) if op is layer_norm else (x, gain, eps)
        replace(graph, node, op, args)


def _spelled(node: fx.Node) -> Core | None:
    """x * rsqrt(mean(x^2) + eps), or a quotient by the root; x may be centred first."""
    if is_call(node, aten.mul.Tensor) and len(node.args) == 2:
        for value, root in (node.args, node.args[::-1]):
            inside = _inverse_root(through_casts(root))
            core = inside and _norm_of(node, value, inside)
            if core:
                return core
    if is_call(node, aten.div.Tensor):
        value, root = node.args[0], through_casts(node.args[1])
        inside = _root(root)
        return _norm_of(node, value, inside) if inside else None
    return None


def _inverse_root(node: Any) -> fx.Node | None:
    if is_call(node, aten.rsqrt.default) or (is_call(node, aten.pow.Tensor_Scalar) and node.args[1] == -0.5):
        return through_casts(node.args[0])
    if is_call(node, aten.reciprocal.default):
        return _root(through_casts(node.args[0]))
    return None


def _root(node: Any) -> fx.Node | None:
    if is_call(node, aten.sqrt.default) or (is_call(node, aten.pow.Tensor_Scalar) and node.args[1] == 0.5):
        return through_casts(node.args[0])
    return None


def _norm_of(out: fx.Node, value: Any, inside: fx.Node) -> Core | None:
    """`inside` must be mean(value^2) + eps, or the variance of what `value` has been centred from."""
    if not is_call(inside, aten.add.Tensor) or inside.kwargs:
        return None
    mean, eps = inside.args
    if isinstance(mean, float):
        mean, eps = eps, mean
    mean, value = through_casts(mean), through_casts(value)
    if not isinstance(eps, float) or not isinstance(value, fx.Node) or not isinstance(mean, fx.Node):
        return None
    centred = _centred_from(value)
    if not (centred or value).meta["val"].is_floating_point():
        return None
    squared = _mean_of_square(mean)
    if squared is not None and _same(squared, value):
        return Core(rms_norm, value, eps, out) if centred is None else Core(layer_norm, centred, eps, out)
    if centred is not None and _variance_of(mean, centred):
        return Core(layer_norm, centred, eps, out)
    return None


def _mean_of_square(mean: fx.Node) -> fx.Node | None:
    if not _over_last(mean, aten.mean.dim):
        return None
    square = through_casts(mean.args[0])
    if is_call(square, aten.pow.Tensor_Scalar) and square.args[1] == 2:
        return through_casts(square.args[0])
    if is_call(square, aten.square.default):
        return through_casts(square.args[0])
    if is_call(square, aten.mul.Tensor) and through_casts(square.args[0]) is through_casts(square.args[1]):
        return through_casts(square.args[0])
    return None


def _variance_of(node: fx.Node, x: fx.Node) -> bool:
    if not is_call(node, aten.var.correction):
        return False
    of, axes = (*node.args, None)[:2]
    kept = bool(node.kwargs.get("correction") == 0) and bool(node.kwargs.get("keepdim", False))
    return kept and through_casts(of) is x and _last(axes, x)


def _centred_from(node: fx.Node) -> fx.Node | None:
    if not is_call(node, aten.sub.Tensor) or node.kwargs:
        return None
    x, mean = through_casts(node.args[0]), through_casts(node.args[1])
    if _over_last(mean, aten.mean.dim) and through_casts(mean.args[0]) is x:
        return x
    return None


def _same(one: fx.Node, two: fx.Node) -> bool:
    """The same value: one node, or the same centring computed twice."""
    if one is two:
        return True
    centred = _centred_from(one)
    return centred is not None and centred is _centred_from(two)


def _over_last(node: Any, target: Any) -> bool:
    return is_call(node, target) and (*node.args, False)[2] is True and _last(node.args[1], node.args[0])


def _last(dims: Any, x: fx.Node) -> bool:
    return isinstance(dims, list | tuple) and len(dims) == 1 and dims[0] % len(shape(x)) == len(shape(x)) - 1


def _with_gain(graph: Graph, core: Core, known: dict[fx.Node, bool]) -> None:
    """Take in the product with a parameter, and for LayerNorm the sum with one, if nobody else reads between."""
    out, gain, bias = after_casts(core.out), None, None
    step = _constant_operand(out, aten.mul.Tensor, known)
    if step is not None:
        gain, out = step[0], after_casts(step[1])
        step = _constant_operand(out, aten.add.Tensor, known) if core.op is layer_norm else None
        if step is not None:
            bias, out = step[0], after_casts(step[1])
    args = (core.x, gain, bias, core.eps) if core.op is layer_norm else (core.x, gain, core.eps)
    replace(graph, out, core.op, args, core.out.meta["where"])


def _constant_operand(node: fx.Node, target: Any, known: dict[fx.Node, bool]) -> tuple[fx.Node, fx.Node] | None:
    """(the parameter expression, the node) where the sole reader combines `node` with one along its last axis."""
    users = list(node.users)
    if len(users) != 1 or not is_call(users[0], target) or users[0].kwargs or len(users[0].args) != 2:
        return None
    operand = other(users[0], node)
    if not isinstance(operand, fx.Node) or not is_constant(operand, known):
        return None
    return (operand, users[0]) if shape(operand) == shape(node)[-1:] else None


def _is_scalar_parameter(node: Any, known: dict[fx.Node, bool]) -> bool:
    return isinstance(node, fx.Node) and is_constant(node, known) and node.meta["val"].numel() == 1


def _dyt(graph: Graph, node: fx.Node, known: dict[fx.Node, bool]) -> None:
    """tanh(alpha * x) * gain + bias with a scalar parameter alpha."""
    inner = through_casts(node.args[0])
    if not is_call(inner, aten.mul.Tensor):
        return
    alpha, x = inner.args
    if not _is_scalar_parameter(alpha, known):
        alpha, x = x, alpha
    if not _is_scalar_parameter(alpha, known):
        return
    gained = _constant_operand(after_casts(node), aten.mul.Tensor, known)
    if gained is None or is_cast(x) or not x.meta["val"].is_floating_point():
        return
    out, bias = after_casts(gained[1]), None
    shifted = _constant_operand(out, aten.add.Tensor, known)
    if shifted is not None:
        bias, out = shifted[0], after_casts(shifted[1])
    replace(graph, out, dyt, (x, alpha, gained[0], bias), node.meta["where"])
