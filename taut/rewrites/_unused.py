"""Parameters that a rewrite has left without a reader leave the graph."""

from __future__ import annotations

from collections.abc import Iterable

from taut.graph import Graph


def drop_unused(graph: Graph, parameters: Iterable[str]) -> None:
    """Remove those of the parameters that nothing reads any more, with their values."""
    graph.fx.eliminate_dead_code()
    placeholders = graph.placeholders("parameter")
    for name in dict.fromkeys(parameters):
        if name in placeholders and not placeholders[name].users:
            graph.fx.erase_node(placeholders[name])
            del graph.values[name]
            graph.written.pop(name, None)
