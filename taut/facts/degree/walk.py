"""The walk along a graph, as a rule sees it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from taut.facts.degree.records import Edge, Reach, Scaled, Step
from taut.facts.scalars import agree
from taut.graph import shape

aten = torch.ops.aten

NOT_PROPORTIONAL = "is not proportional to its input"


class Walk:
    """The values that carry the scalar so far; those in `live` hand it on."""

    def __init__(self, found: Reach, until_product: bool) -> None:
        self.found, self.until_product = found, until_product
        self.live: set[fx.Node] = set()
        self.known: dict[fx.Node, bool] = {}

    def at(self, node: Any) -> Scaled | None:
        return self.found.scaled[node] if isinstance(node, fx.Node) and node in self.live else None

    def sources(self, node: fx.Node) -> list[fx.Node]:
        return [source for source in node.all_input_nodes if source in self.live]

    def degree(self, x: Any) -> int:
        at = self.at(x)
        return 0 if at is None else at.degree

    def stop(self, user: fx.Node, source: fx.Node, reason: str, before_bias: bool = False) -> None:
        at = self.found.scaled[source]
        self.found.frontier.append(Edge(user, source, at.degree, reason, at.behind, before_bias))


def args(node: fx.Node) -> Any:
    return node.args


def common(walk: Walk, node: fx.Node, operands: list[Any], degree: int) -> Scaled | str:
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
