"""Fold a norm's gain, and its bias with it, into every linear layer that reads it.

    norm(x) * g + b  then  W, c   =   norm(x)  then  W diag(g),  c + W b        (W b with the unfolded W)

The norm's own parameters become the values that do nothing: ones and zeros, or zeros for the gain where the model
computes 1 + w. All readers take the gain or none does; all uses of a shared parameter must want the same.

Source: Graef, Makraduli, Wasielewski and Clapp, FlashNorm: fast normalization for transformers, 2024,
arXiv:2407.09577, propositions 1 and 2 and the remarks on biases and dynamic tanh.
Differs: readers are found by data flow, not by names; `1 + w` is decided by evaluating the graph; routers, experts,
convolutions, pooled and permuted readers are covered; a shared parameter is folded only if all of its uses agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from taut.facts.contraction import also_read, name_of, place, times_read, uses
from taut.facts.gains import Gain, gain_of
from taut.facts.readers import Reader, readers
from taut.graph import Graph, shape
from taut.ops.dyt import dyt
from taut.ops.layer_norm import layer_norm
from taut.ops.rms_norm import rms_norm
from taut.rewrite import Exactness, Form, Rewrite, Site
from taut.values import Filled, Pick, Scaled, Shifted, Value, varies_along


@dataclass(eq=False)
class Fold:
    """What folding one norm does: `becomes` by parameter, and the nodes through which it may be used."""

    norm: fx.Node
    becomes: dict[str, Value]
    through: dict[str, set[fx.Node]]
    together: tuple[Fold, ...] = ()


def sites(graph: Graph, form: Form) -> list[Site]:
    used = uses(graph)
    found: list[tuple[Site, Fold | None]] = []
    for norm in graph.calls(rms_norm, layer_norm, dyt):
        where = norm.meta["where"] or norm.name
        fold = _fold(graph, norm, form, used)
        if isinstance(fold, str):
            found.append((Site(where, fold), None))
        else:
            reads = tuple(name for name, value in fold.becomes.items() if isinstance(value, Filled))
            found.append((Site(where, None, reads, tuple(fold.becomes)), fold))
    return _agreeing(graph, found, used)


def _parts(norm: fx.Node) -> tuple[Any, Any]:
    """The nodes of a norm's gain and bias."""
    if norm.target is rms_norm:
        return norm.args[1], None
    first = 1 if norm.target is layer_norm else 2
    return norm.args[first], norm.args[first + 1]


def _fold(graph: Graph, norm: fx.Node, form: Form, used: dict[str, set[fx.Node]]) -> Fold | str:
    gain_node, bias_node = _parts(norm)
    if gain_node is None:
        return "it has no gain to fold" if bias_node is None else "it has a bias but no gain"
    gain = gain_of(graph, gain_node)
    bias = None if bias_node is None else gain_of(graph, bias_node)
    if isinstance(gain, str):
        return gain
    if isinstance(bias, str):
        return bias
    if _does_nothing(graph, gain, 1.0, form) and (bias is None or _does_nothing(graph, bias, 0.0, form)):
        return "already folded: its gain is one"
    found = readers(graph, norm, shape(gain_node))
    if isinstance(found, str):
        return found
    fold = Fold(norm, {}, {})
    fold.becomes[gain.parameter] = gain.neutral(1.0)
    fold.through[gain.parameter] = {norm}
    if bias is not None:
        fold.becomes[bias.parameter] = bias.neutral(0.0)
        fold.through[bias.parameter] = {norm}
    for reader in found:
        reason = _take(graph, fold, reader, gain, bias, form)
        if reason is not None:
            return reason
    return fold


def _does_nothing(graph: Graph, gain: Gain, value: float, form: Form) -> bool:
    """In taut form a gain that stands on disk as ones is folded nevertheless: its product then leaves the graph."""
    neutral = gain.neutral(value)
    return graph.holds(gain.parameter, neutral) if form.stock else graph.values[gain.parameter] == neutral


def _take(graph: Graph, fold: Fold, reader: Reader, gain: Gain, bias: Gain | None, form: Form) -> str | None:
    """Let one reader take the gain; a reason where it cannot."""
    product = reader.contraction
    spot = place(graph, product.weight, product.axis, multiplied=bias is None)
    if isinstance(spot, str):
        return f"{name_of(product.node)}: {spot}"
    order = spot.along(reader.features)
    if -1 in order:
        return f"{spot.parameter} is read only in part"
    weight = graph.values[spot.parameter]
    by = Pick(gain.value(graph), None if order == tuple(range(gain.size)) else order)
    reason = _claim(fold, spot.parameter, Scaled(weight, by, spot.axis), product.node)
    if reason is None and bias is not None:
        reason = _take_bias(graph, fold, reader, bias, weight, order, spot.axis, form)
    return reason


def _take_bias(
    graph: Graph, fold: Fold, reader: Reader, bias: Gain, weight: Value, order: tuple[int, ...], axis: int, form: Form
) -> str | None:
    product = reader.contraction
    reading = name_of(product.node)
    if reader.gain_only:
        return f"the norm has a bias, which is multiplied on its way to {reading}"
    if product.padded:
        return f"the norm has a bias and {reading} pads its input with zeros"
    if product.depthwise:
        return f"the norm has a bias and {reading} is depthwise"
    if product.bias is None:
        return f"the norm has a bias and {reading} has none"
    own = place(graph, product.bias, 0)
    kept = place(graph, product.weight, product.keep)
    if isinstance(own, str) or isinstance(kept, str) or own.order != kept.order:
        return f"the bias of {reading} is not laid out as its weight"
    shift = Pick(bias.value(graph), None if order == tuple(range(bias.size)) else order)
    shifted = Shifted(graph.values[own.parameter], weight, shift, axis, kept.axis)
    return _claim(fold, own.parameter, shifted, product.node)


def _claim(fold: Fold, parameter: str, value: Value, node: fx.Node) -> str | None:
    if fold.becomes.setdefault(parameter, value) != value:
        return f"{parameter} is read twice, in different ways"
    fold.through.setdefault(parameter, set()).add(node)
    return None


def _agreeing(graph: Graph, found: list[tuple[Site, Fold | None]], used: dict[str, set[fx.Node]]) -> list[Site]:
    """Refuse, until nothing changes, every site with a parameter that some use wants otherwise."""
    while True:
        wanted: dict[str, list[Fold]] = {}
        for site, fold in found:
            if fold is not None and site.refused is None:
                for parameter in fold.becomes:
                    wanted.setdefault(parameter, []).append(fold)
        refused = False
        for i, (site, fold) in enumerate(found):
            if fold is None or site.refused is not None:
                continue
            reason = _conflict(graph, fold, wanted, used) or _unwritable(graph, fold)
            if reason is not None:
                found[i] = (site.refuse(reason), None)
                refused = True
        if not refused:
            return [_bound(site, fold, wanted) for site, fold in found]


def _conflict(graph: Graph, fold: Fold, wanted: dict[str, list[Fold]], used: dict[str, set[fx.Node]]) -> str | None:
    for parameter, value in fold.becomes.items():
        twice = next((n for n in fold.through[parameter] if times_read(n, parameter) > 1), None)
        if twice is not None:
            return f"{parameter} is read twice by {name_of(twice)}"
        through = set().union(*(other.through[parameter] for other in wanted[parameter]))
        if any(other.becomes[parameter] != value for other in wanted[parameter]):
            return f"another norm would change {parameter} otherwise"
        outside = used[parameter] - through
        if outside:
            return also_read(graph, parameter, outside)
    return None


def _unwritable(graph: Graph, fold: Fold) -> str | None:
    if graph.unwritable is None:
        return None
    reasons = (graph.unwritable(parameter, varies_along(value)) for parameter, value in fold.becomes.items())
    return next((reason for reason in reasons if reason), None)


def _bound(site: Site, fold: Fold | None, wanted: dict[str, list[Fold]]) -> Site:
    if fold is not None:
        partners = {id(other): other for parameter in fold.becomes for other in wanted[parameter]}
        fold.together = tuple(other for other in partners.values() if other is not fold)
        return Site(site.where, site.refused, site.reads, site.writes, site.note, fold)
    return site


def change(graph: Graph, chosen: list[Site]) -> None:
    for site in chosen:
        graph.values.update(site.detail.becomes)


fold_norm = Rewrite("fold_norm", Exactness.ALGEBRAIC, sites, change, order=1)
