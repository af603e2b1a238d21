"""Leave out the final norm's division where only the largest logit is asked for.

    argmax(s z) = argmax(z)        for every s > 0

Source: Graef, Makraduli, Wasielewski and Clapp, FlashNorm: fast normalization for transformers, 2024,
arXiv:2407.09577, proposition 2, with the remark that an order is kept by positive factors (ours).
Differs: the division is dropped, not deferred; the promise is on argmax(logits) alone.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from taut.facts.degree import reach
from taut.graph import Graph
from taut.rewrite import TAUT, Exactness, Form, Rewrite, Site
from taut.rewrites._division import divided, leave_out, per_site

LOGITS = "logits"


def sites(graph: Graph, form: Form) -> list[Site]:
    return per_site(graph, _only_logits)


def _only_logits(graph: Graph, norm: fx.Node) -> str | None:
    """Why a norm's scale reaches more than the order of the logits of one token."""
    found = reach(graph, norm)
    nodes: Any = graph.output.args[0]
    for edge in found.frontier:
        if edge.user is not graph.output:
            return f"it is needed before the logits: {edge}"
        names = [name for name, node in zip(graph.outputs, nodes, strict=True) if node is edge.source]
        if names != [LOGITS]:
            return f"it reaches the output {', '.join(n for n in names if n != LOGITS)}: promise the logits alone"
        if edge.degree < 0 or found.scaled[edge.source].ids.shape[-1] != 1:
            return "the logits of one token carry different scales"
    if found.absorbers:
        return "it is read by another norm"
    return None if found.frontier else "nothing behind it reads its scale"


def change(graph: Graph, chosen: list[Site]) -> None:
    for site in chosen:
        leave_out(graph, site.detail, divided(graph, site.detail))


drop_final_scale_for_argmax = Rewrite(
    "drop_final_scale_for_argmax",
    Exactness.ALGEBRAIC,
    sites,
    change,
    forms=(TAUT,),
    promises="argmax",
    asked=True,
    order=3,
)
