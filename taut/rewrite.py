"""A rewrite: Graph to Graph, with the promise it makes about what the model returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from taut.catalogue import find as find_all
from taut.graph import Graph
from taut.values import Value


class Exactness(Enum):
    """What a rewrite promises, and what checks it."""

    BITWISE = "the same bits"
    ALGEBRAIC = "the same real-number function"
    BOUNDED = "within a stated bound on the user's data"
    TRAINED = "no promise before evaluation"


@dataclass(frozen=True)
class Site:
    """One place where a rewrite applies, or would but for a reason.

    `where` is a module path; `reads` and `writes` are parameters; `note` is a remark for people; `detail` is for the
    rewrite that found the site.
    """

    where: str
    refused: str | None = None
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    note: str = ""
    detail: Any = field(default=None, compare=False, repr=False)

    def refuse(self, reason: str) -> Site:
        return replace(self, refused=reason)


@dataclass(frozen=True)
class Form:
    """What a rewritten model may look like: stock keeps its class and its layout, the others may change both."""

    name: str

    @property
    def stock(self) -> bool:
        return self.name == "stock"


STOCK, TAUT, STEP = Form("stock"), Form("taut"), Form("step")
"""STEP is the graph of one decoding step, which is run and never written."""


@dataclass(frozen=True)
class Bound:
    """How far a BOUNDED rewrite may take a model; apart from the values that it loses accuracy in it is exact.

    `decoded(site, value_of)` has those parameters of the graph before it with what the graph behind it computes with,
    in terms of the parameters that it adds, whose values `value_of` gives by name. `noise(graph, site, seed)` has the
    same parameters with random noise of the accuracy that their format has. The promise: what is lost is at most twice
    what the noise loses, and on a text the perplexity rises by at most `perplexity`, as a part of it, where one is
    promised.
    """

    decoded: Callable[[Site, Callable[[str], Value]], dict[str, Value]]
    noise: Callable[[Graph, Site, int], dict[str, Value]]
    perplexity: float | None = None


@dataclass(frozen=True)
class Rewrite:
    """`sites(graph, form)` finds every place, refused ones with the reason; `change(graph, sites)` edits in place.

    `promises` names the outputs that keep their values, None for all of them. `asked` rewrites run only when named.
    A BOUNDED one that can be proved has a `bound`.
    """

    name: str
    exactness: Exactness
    sites: Callable[[Graph, Form], list[Site]]
    change: Callable[[Graph, list[Site]], None]
    forms: tuple[Form, ...] = (STOCK, TAUT)
    promises: str | None = None
    asked: bool = False
    order: int = 0
    absent: str = "there is no place for it in this model"
    bound: Bound | None = None

    def find(self, graph: Graph, form: Form = TAUT) -> list[Site]:
        """Every site in the graph, applied or refused."""
        if form not in self.forms:
            return []
        return _numbered(self.sites(graph, form))

    def apply(self, graph: Graph, sites: Iterable[Site | str] | None = None, form: Form = TAUT) -> Graph:
        """A rewritten copy of the graph: at the sites given, or at all that are not refused.

        Raises ValueError for a site that does not exist here or is refused, with the reason.
        """
        changed = graph.copy()
        found = self.find(changed, form)
        if sites is None:
            chosen = [site for site in found if site.refused is None]
        else:
            chosen = _chosen(self.name, found, {s if isinstance(s, str) else s.where for s in sites})
        if chosen:
            read = changed.read_tensors()
            self.change(changed, chosen)
            changed.fx.eliminate_dead_code()
            changed.drop(read - changed.read_tensors())
            changed.fx.lint()
        return changed


def _numbered(sites: list[Site]) -> list[Site]:
    """A module that is called several times has several sites; tell them apart."""
    count: dict[str, int] = {}
    numbered = []
    for site in sites:
        count[site.where] = count.get(site.where, 0) + 1
        n = count[site.where]
        numbered.append(site if n == 1 else replace(site, where=f"{site.where}#{n}"))
    return numbered


def _chosen(name: str, found: list[Site], wanted: set[str]) -> list[Site]:
    by_where = {site.where: site for site in found}
    for where in sorted(wanted):
        if where not in by_where:
            raise ValueError(f"{name} finds no site {where!r} in this model")
        if by_where[where].refused:
            raise ValueError(f"{name} refuses {where}: {by_where[where].refused}")
    chosen = [site for site in found if site.where in wanted]
    for site in chosen:
        partners = {id(detail) for detail in getattr(site.detail, "together", ())}
        missing = next((s for s in found if id(s.detail) in partners and s.where not in wanted), None)
        if missing is not None:
            raise ValueError(f"{name} at {site.where} shares a parameter with {missing.where}: both or neither")
    return chosen


def rewrites() -> dict[str, Rewrite]:
    """Every rewrite in `taut/rewrites/`, in the order in which they are tried."""
    found = {rewrite.name: rewrite for rewrite in find_all("taut.rewrites", Rewrite).values()}
    return dict(sorted(found.items(), key=lambda item: (item[1].order, item[0])))
