"""What `inspect` finds in a lifted graph: every site of every rewrite, and what each op costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from taut.cost import Cost, costs, decodes
from taut.graph import Graph
from taut.machine import Machine
from taut.plans import all_sites
from taut.rewrite import Site


@dataclass
class Inspection:
    """Every site of every rewrite, refused ones with the reason, and what folding leaves idle.

    `costs` are those of the lifted `graph`, counted in `dtype`, and those of a decoding `step` where the model has one.
    `prior` has the marks of an earlier rewrite, and `evidence` its proof.
    """

    model: str
    model_class: str
    parameters: int
    bytes: int
    sites: list[dict[str, Any]]
    idle_parameters: int
    idle_bytes: int
    outputs: list[str]
    graph: Graph = field(repr=False)
    costs: list[Cost] = field(repr=False)
    machine: Machine | None = field(repr=False)
    step: bool
    dtype: torch.dtype | None
    prior: dict[str, Any] = field(default_factory=dict)
    evidence: dict[str, Any] | None = None

    def as_dict(self, ops: bool = False) -> dict[str, Any]:
        inner = ("graph", "costs", "machine", "step", "dtype")
        shown = {k: v for k, v in vars(self).items() if k not in inner}
        cost = [found.as_dict(self.machine, ops) for found in self.costs]
        return shown | {"machine": self.machine.name if self.machine else None, "cost": cost}


def inspection(
    name: str, model: nn.Module, graph: Graph, dtype: torch.dtype | None, machine: Machine | None
) -> Inspection:
    """`dtype` is what bytes are counted in; None for that of each parameter."""
    sites = all_sites(graph)
    sizes = {n: p if dtype is None else p.to("meta", dtype) for n, p in model.named_parameters()}
    folded = {p for rewrite, site in sites if rewrite == "fold_norm" and not site.refused for p in site.reads}
    idle = [sizes[p] for p in folded if p in sizes]
    return Inspection(
        model=name,
        model_class=type(model).__name__,
        parameters=sum(p.numel() for p in sizes.values()),
        bytes=sum(p.nbytes for p in sizes.values()),
        sites=[_site(rewrite, site) for rewrite, site in sites],
        idle_parameters=sum(p.numel() for p in idle),
        idle_bytes=sum(p.nbytes for p in idle),
        outputs=list(graph.outputs),
        graph=graph,
        costs=costs(graph, decodes(model), dtype),
        machine=machine,
        step=decodes(model),
        dtype=dtype,
    )


def _site(rewrite: str, site: Site) -> dict[str, Any]:
    shown = {"rewrite": rewrite, "where": site.where, "refused": site.refused, "reads": list(site.reads)}
    return shown | {"writes": list(site.writes), "note": site.note}
