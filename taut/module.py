"""Rewriting a model in memory: the same class back in stock form, a module that runs its graph in taut form."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from taut.graph import Graph
from taut.lift import lift
from taut.lossy import prove_plan
from taut.plans import Plan, follow, plan_and_apply
from taut.proof import Evidence, compare_modules
from taut.tracing import trace
from taut.twin import exactness, promises

RECORD, WRITES = "taut_plan", "taut_plan_writes"


class GraphModule(nn.Module):
    """A rewritten graph as a module: keyword tensors in, a dictionary of the promised outputs out."""

    def __init__(self, graph: Graph, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.graph = graph
        tensors = tensors or {name: graph.evaluate(name, None).clone() for name in graph.values}
        self.weights = nn.ParameterDict(
            {key(name): nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
        )

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        return self.graph.run(inputs, {name: self.weights[key(name)] for name in self.graph.values})


def key(name: str) -> str:
    """A parameter's name as one that a module may register."""
    return name.replace(".", "/")


def graph_of(model: nn.Module, example: Mapping[str, Tensor] | None, outputs: str) -> Graph:
    return trace(model, inputs_of(model, example), outputs=outputs)


def apply_module(
    model: nn.Module,
    plan: Plan | None,
    example: Mapping[str, Tensor] | None,
    only: Iterable[str] | None,
    form: str,
    outputs: str,
) -> nn.Module:
    """A rewritten copy of a model; the one passed in stays as it is."""
    form = plan.form if plan else form
    kept = plan.outputs if plan else outputs
    raw = trace(model, inputs_of(model, example), outputs=kept, symbolic=form == "taut")
    lifted = lift(raw)
    if plan is None:
        plan, graph = plan_and_apply(lifted, form, only, outputs)
    else:
        graph = follow(lifted, plan)
    new = _stock_copy(model, graph) if plan.form == "stock" else GraphModule(graph)
    setattr(new, RECORD, plan)
    setattr(new, WRITES, tuple(graph.changed()))
    return new.train(model.training)


def _stock_copy(model: nn.Module, graph: Graph) -> nn.Module:
    new = copy.deepcopy(model)
    parameters = dict(new.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name in graph.changed():
            parameters[name].copy_(graph.evaluate(name, None))
    return new


def verify_modules(before: nn.Module, after: nn.Module, example: Mapping[str, Tensor] | None) -> Evidence:
    """Replay the plan that `after` was made by on `before`, and prove it; without one, only compare the outputs."""
    inputs = inputs_of(before, example)
    plan: Plan | None = getattr(after, RECORD, None)
    if plan is None:
        return compare_modules(before, after, inputs)
    raw = trace(before, inputs, outputs=plan.outputs)
    lifted = lift(raw)
    changed, stored = follow(lifted, plan).changed(), _stored(after)
    more = [] if example is not None else [inputs_of(before, None, seed) for seed in range(1, 9)]
    evidence, graph = prove_plan(
        raw,
        lifted,
        plan,
        [inputs],
        written={name: stored[name] for name in changed},
        promises=promises(plan, raw.outputs),
        exactness=exactness(plan),
        spare=more,
    )
    untouched = [n for n in graph.values if n not in changed and not torch.equal(stored[n], raw.tensors[n])]
    if untouched:
        evidence.passed = False
        evidence.wrong_tensors += untouched
    return evidence


def _stored(after: nn.Module) -> dict[str, Tensor]:
    if isinstance(after, GraphModule):
        return {name: after.weights[key(name)].detach() for name in after.graph.values}
    return {name: p.detach() for name, p in after.named_parameters(remove_duplicate=False)}


def inputs_of(model: nn.Module, example: Mapping[str, Tensor] | None, seed: int = 0) -> dict[str, Any]:
    """The example, or made-up inputs on the model's device. Raises ValueError where a module has no configuration."""
    if example is not None:
        return dict(example)
    if not hasattr(model, "config"):
        raise ValueError("give an example: a dict of keyword tensors that the model's forward takes")
    from taut.shrink import example_inputs

    return example_inputs(model, seed=seed)
