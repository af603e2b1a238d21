"""What each norm of a model costs and why: which are free, which can be made free and by what, which never.

Source: the report per norm of Guo et al., Enjoy Your Layer Normalization with the Computational Efficiency of RMSNorm,
2026, arXiv:2605.14521 (foldable norms); what makes a norm free: Graef et al., FlashNorm, 2024, arXiv:2407.09577.
Differs: a norm has three parts, each judged by the rewrites that remove it, and the reasons are those rewrites' own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from taut.facts.contraction import uses
from taut.graph import Graph
from taut.ops.dyt import dyt
from taut.ops.layer_norm import layer_norm
from taut.ops.rms_norm import rms_norm
from taut.rewrite import Rewrite, rewrites

Verdict = Literal["free", "can be made free", "never free"]

GAIN, MEAN, DIVISION = "gain", "mean", "division"
REMOVES = {
    GAIN: ("fold_norm", "fold_qk_norm_gain"),
    MEAN: ("center_norm_input",),
    DIVISION: ("cancel_norm", "defer_norm"),
}
"""The rewrites that remove each part, in the order in which they are tried; each part is judged once those before it
are gone."""

UNTIE, LOGITS = "--untie", "--outputs logits"
CONCESSIONS = ((), (UNTIE,), (LOGITS,), (UNTIE, LOGITS))


@dataclass(frozen=True)
class NormReport:
    """One norm. `removed` says by which rewrite each part goes, `kept` why it stays; `needs` is what must be given up.

    A norm that is free costs no pass of its own: its gain is in the weights behind it, its mean is not taken, and its
    division waits for no product to begin.
    """

    where: str
    kind: str
    verdict: Verdict
    needs: tuple[str, ...] = ()
    removed: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def norm_report(graph: Graph) -> list[NormReport]:
    """Every norm of a lifted graph, judged in taut form. From shapes alone: no tensor is read."""
    found: dict[str, NormReport] = {}
    for given_up in CONCESSIONS:
        changed = _with(graph, given_up)
        if given_up and (changed is None or all(report.verdict == "free" for report in found.values())):
            continue
        for report in _judge(changed or graph, given_up):
            known = found.get(report.where)
            if known is None or (known.kept and len(report.kept) <= len(known.kept)):
                found[report.where] = report
    return list(found.values())


def _with(graph: Graph, given_up: Iterable[str]) -> Graph | None:
    """The graph of a model that has given something up; None where there is nothing to give up."""
    changed: Graph | None = graph.copy()
    for what in given_up:
        changed = None if changed is None else _untied(changed) if what == UNTIE else _logits_alone(changed)
    return changed


def _untied(graph: Graph) -> Graph | None:
    """Each use of a tied parameter gets a parameter of its own, which may be written where the tied one may."""
    tied = [name for name in graph.values if len(graph.names_of(name)) > 1]
    home: dict[str, str] = {}
    for name in tied:
        leaf = graph.placeholders("parameter")[name]
        _, *others = sorted(uses(graph)[name])
        for i, user in enumerate(others):
            if leaf in user.all_input_nodes:
                own = graph.add_parameter(f"{name}#{i + 2}", graph.values[name], leaf.meta["val"])
                user.replace_input_with(leaf, own)
                home[f"{name}#{i + 2}"] = name
    if (asked := graph.unwritable) is not None:
        graph.unwritable = lambda name, axes: asked(home.get(name, name), axes)
    return graph if tied else None


def _logits_alone(graph: Graph) -> Graph | None:
    if "logits" not in graph.outputs or len(graph.outputs) == 1:
        return None
    results: Any = graph.output.args[0]
    graph.output.args = ((results[graph.outputs.index("logits")],),)
    graph.outputs = ("logits",)
    graph.fx.eliminate_dead_code()
    return graph


def _judge(graph: Graph, given_up: tuple[str, ...]) -> list[NormReport]:
    kinds = _kinds(graph)
    removed: dict[str, dict[str, str]] = {where: {} for where in kinds}
    kept: dict[str, dict[str, str]] = {where: {} for where in kinds}
    for part, names in REMOVES.items():
        for rewrite in (rewrites()[name] for name in names):
            graph = _try(graph, rewrite, part, removed, kept, last=part == DIVISION)
    return [_report(where, kind, given_up, removed[where], kept[where]) for where, kind in kinds.items()]


def _kinds(graph: Graph) -> dict[str, str]:
    """The op of each norm, by the name that every rewrite gives its site."""
    count: dict[str, int] = {}
    kinds: dict[str, str] = {}
    for node in graph.calls(rms_norm, layer_norm, dyt):
        where = node.meta["where"] or node.name
        count[where] = count.get(where, 0) + 1
        target: Any = node.target
        kinds[where if count[where] == 1 else f"{where}#{count[where]}"] = target.name
    return kinds


def _try(
    graph: Graph,
    rewrite: Rewrite,
    part: str,
    removed: dict[str, dict[str, str]],
    kept: dict[str, dict[str, str]],
    last: bool,
) -> Graph:
    """Note what a rewrite says of a part of every norm; apply it, unless the parts behind it need no more."""
    sites = [site for site in rewrite.find(graph) if site.where in removed]
    for site in sites:
        if part in removed[site.where]:
            continue
        if site.refused is None:
            removed[site.where][part] = rewrite.name
            kept[site.where].pop(part, None)
        elif not site.refused.startswith(("it has no gain", "already folded")):
            kept[site.where][part] = site.refused
    chosen = [site for site in sites if site.refused is None]
    return rewrite.apply(graph, chosen) if chosen and not last else graph


def _report(
    where: str, kind: str, given_up: tuple[str, ...], removed: dict[str, str], kept: dict[str, str]
) -> NormReport:
    if kind == "dyt":
        kept = kept | {DIVISION: "its tanh is no division and cannot be put off"}
    asked = tuple(name for name in removed.values() if rewrites()[name].asked)
    needs = (*given_up, *asked)
    verdict: Verdict = "never free" if kept else "can be made free" if needs else "free"
    return NormReport(where, kind, verdict, () if kept else needs, removed, kept)
