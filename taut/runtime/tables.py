"""What depends on constants alone, or on the position and constants alone, is not matched but evaluated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from taut.graph import Graph, call
from taut.runtime.step import POSITION

CHUNK = 256
CONSTANT, BY_POSITION, LIVE = "constant", "by position", "live"


class Tables:
    """The kinds of a step graph's nodes, and the values of those that no token decides."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.caches = graph.placeholders("input")
        self.max_length = next(n.meta["val"].shape[2] for name, n in self.caches.items() if name.startswith("keys."))
        self.kinds: dict[fx.Node, str] = {}
        for node in graph.nodes:
            self.kinds[node] = self._kind(node)

    def _kind(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            if node.meta["kind"] != "input":
                return CONSTANT
            return BY_POSITION if node.meta["tensor"] == POSITION else LIVE
        kinds = {self.kinds[source] for source in node.all_input_nodes}
        return next((kind for kind in (LIVE, BY_POSITION) if kind in kinds), CONSTANT)

    def constant(self, node: fx.Node) -> Tensor:
        """The value of a node that no input reaches; parameters as stored, widened to float32."""
        return self._value(node, {})

    def table(self, node: fx.Node, reduce: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """A node's value at every position, (max_length, *its shape).

        `reduce(values, positions)` makes less of some hundred positions' values at a time.
        """
        chunks = torch.arange(self.max_length).split(CHUNK)
        keep = reduce or (lambda values, positions: values)
        with torch.no_grad():
            return torch.cat([keep(self._at(node, positions), positions) for positions in chunks])

    def _at(self, node: fx.Node, positions: Tensor) -> Tensor:
        start = self.caches[POSITION]

        def at(position: Tensor) -> Tensor:
            return self._value(node, {start: position[None]})

        try:
            return torch.vmap(at)(positions)
        except RuntimeError:  # some operation knows no batches
            return torch.stack([at(position) for position in positions])

    def _value(self, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        """Evaluate by walking, without recursion, for what a node depends on may be long."""
        pending = [node]
        while pending:
            now = pending[-1]
            missing = [] if now in known else [source for source in now.all_input_nodes if source not in known]
            if missing:
                pending += missing
                continue
            pending.pop()
            if now not in known:
                known[now] = self._placed(now) if now.op == "placeholder" else self._called(now, known)
        return known[node]

    def _called(self, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        return call(node, known.__getitem__, torch.device("cpu"))

    def _placed(self, node: fx.Node) -> Tensor:
        name = node.meta["tensor"]
        if node.meta["kind"] == "buffer":
            return self.graph.tensors[name].cpu()
        value = self.graph.evaluate(name, None).cpu()
        return value.float() if value.is_floating_point() else value
