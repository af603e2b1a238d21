"""Lift: ATen patterns become the field's words, each an Op whose reference is the pattern that it replaced.

One file a word, found by listing this folder; each has `lift(graph)`, which replaces what it recognises and leaves the
rest. Lifting is an ALGEBRAIC rewrite and is verified as one.
"""

from __future__ import annotations

from taut.catalogue import modules
from taut.graph import Graph


def lift(graph: Graph) -> Graph:
    """A copy of the graph in which what is recognised is one node."""
    lifted = graph.copy()
    for module in sorted(modules("taut.lift"), key=lambda m: m.ORDER):
        module.lift(lifted)
        lifted.fx.eliminate_dead_code()
    lifted.fx.lint()
    return lifted
