"""Do a norm's division behind the products that read it, so that they need not wait for it.

    rms_norm(x) W  =  s ((x g) W)        s = inv_rms(x)

The scalar goes through everything that commutes with it (views, rotary tables, ReLU, products) and is put in where
something does not: directly behind the first products, or as far on as it gets, whichever multiplies fewer elements.
A norm that it meets on the way takes it into its epsilon. A layer's bias is added behind the scalar.

Source: Graef, Makraduli, Wasielewski and Clapp, FlashNorm: fast normalization for transformers, 2024,
arXiv:2407.09577, proposition 2 and the sections on ReLU and GLU; for LayerNorm: Salmani and Soloveychik, LLM inference
acceleration via efficient operation fusion, 2025, arXiv:2502.17728.
Differs: how far the scalar gets is decided by data flow; a norm behind it absorbs it exactly, epsilon included.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from taut.facts.degree import Absorber, Edge, Reach, reach
from taut.facts.moves import is_move
from taut.graph import Graph
from taut.ops.inv_rms import inv_rms
from taut.rewrite import TAUT, Exactness, Form, Rewrite, Site
from taut.rewrites._division import Carrier, absorb, divided, epsilon, leave_out, per_site, put_in


@dataclass(frozen=True)
class Cut:
    """Where the scalar is put in, and the norms that take it into their epsilon."""

    found: Reach
    edges: tuple[Edge, ...]
    absorbers: tuple[Absorber, ...]

    @property
    def multiplied(self) -> int:
        """Elements that are multiplied by the scalar; an epsilon counts one a token."""
        values = {edge.source: _size(edge.source) for edge in self.edges}
        tokens = [_size(a.norm) // a.norm.meta["val"].shape[-1] for a in self.absorbers]
        return sum(values.values()) + sum(tokens)


def sites(graph: Graph, form: Form) -> list[Site]:
    return per_site(graph, cut_of)


def cut_of(graph: Graph, norm: fx.Node) -> Cut | str:
    """The cheaper of the two places, or in words why deferring is of no use."""
    far = reach(graph, norm)
    if not far.frontier:
        return (
            "its division cancels: cancel_norm leaves it out" if far.absorbers else "nothing behind it reads its scale"
        )
    for edge in far.frontier:
        if not edge.behind:
            return f"it is needed before any product: {edge}"
    near = reach(graph, norm, until_product=True)
    return min(_placed(near), _placed(far), key=lambda cut: cut.multiplied)


def _placed(found: Reach) -> Cut:
    """The cut at the frontier, edges pulled back through movements that only repeat or reorder a value."""
    edges = {(edge.user, edge.source): edge for edge in found.frontier}
    while True:
        source = next((edge.source for edge in edges.values() if _can_pull(edge, edges)), None)
        if source is None:
            return Cut(found, tuple(edges.values()), tuple(found.absorbers))
        group = [edges.pop((user, source)) for user in source.users]
        before = source.args[0]
        assert isinstance(before, fx.Node)
        edges[source, before] = Edge(source, before, group[0].degree, group[0].reason, behind=True)


def _can_pull(edge: Edge, edges: dict[tuple[fx.Node, fx.Node], Edge]) -> bool:
    source = edge.source
    if edge.before_bias or not is_move(source) or any((user, source) not in edges for user in source.users):
        return False
    before = source.args[0]
    return isinstance(before, fx.Node) and isinstance(before.meta["val"], Tensor) and _size(before) <= _size(source)


def _size(node: fx.Node) -> int:
    return node.meta["val"].numel()


def change(graph: Graph, chosen: list[Site]) -> None:
    for site in chosen:
        norm = site.detail
        cut = cut_of(graph, norm)
        if isinstance(cut, str):
            raise ValueError(f"defer_norm at {site.where}: {cut}")
        value = divided(graph, norm)
        carrier = Carrier(graph, cut.found, graph.insert(inv_rms, (value, epsilon(norm)), norm))
        put_in(carrier, cut.edges)
        absorb(carrier, cut.absorbers, -2)
        leave_out(graph, norm, value)


defer_norm = Rewrite("defer_norm", Exactness.ALGEBRAIC, sites, change, forms=(TAUT,), order=6)
