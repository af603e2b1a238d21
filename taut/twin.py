"""The proof on a shrunk twin: the same configuration with small sizes, where true float64 costs nothing.

The plan that was made for the model is carried over to the twin by the pattern of its module paths, and the twin must
agree with it: the same sites found, the same refused. What the twin does not have is not proved, and fails.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from taut.graph import Graph
from taut.lift import lift
from taut.lossy import prove_plan
from taut.plans import Plan, Step, form_of
from taut.proof import Evidence
from taut.rewrite import Exactness, rewrites
from taut.shrink import CannotShrink, example_inputs, shrink, tiny_model
from taut.tracing import trace

EXAMPLES = 4
SPARE = 16


def pattern(where: str) -> str:
    """A module path with its layer numbers taken out."""
    return re.sub(r"\d+", "N", where.split("#")[0])


def twin_of(model_class: type[nn.Module], config: Any, dtype: torch.dtype) -> nn.Module:
    """A tiny model of the same class and kinds of layers, with random gains and biases.

    Raises CannotShrink with the reason.
    """
    return tiny_model(model_class, shrink(config), dtype=dtype)


def examples(model: nn.Module, first: int, count: int) -> Iterator[dict[str, Tensor]]:
    return (example_inputs(model, seed=seed) for seed in range(first, first + count))


def prove_on_twin(model_class: type[nn.Module], config: Any, plan: Plan, dtype: torch.dtype) -> Evidence:
    """Apply the plan's rewrites at the twin's sites of the same pattern, and prove it there."""
    try:
        twin = twin_of(model_class, config, dtype)
    except CannotShrink as error:
        return _unproved(plan, f"no shrunk twin of this configuration could be built: {error}")
    inputs = list(examples(twin, 0, EXAMPLES))
    raw = trace(twin, inputs[0], outputs=plan.outputs)
    lifted = lift(raw)
    carried, missing = _carry_over(lifted, plan)
    evidence, _ = prove_plan(
        raw,
        lifted,
        carried,
        inputs,
        promises=promises(plan, raw.outputs),
        spare=examples(twin, EXAMPLES, SPARE),
        exactness=exactness(plan),
    )
    if missing:
        evidence = replace(evidence, passed=False, unproved=[*evidence.unproved, *missing])
    return evidence


def exactness(plan: Plan) -> Exactness:
    """The weakest promise among the plan's rewrites."""
    order = list(Exactness)
    kinds = [rewrites()[step.rewrite].exactness for step in plan.steps]
    return max(kinds, key=order.index, default=Exactness.BITWISE)


def promises(plan: Plan, outputs: tuple[str, ...]) -> dict[str, str]:
    """What each output keeps: its values, or less where a rewrite promises less."""
    narrowed = [rewrites()[step.rewrite].promises for step in plan.steps]
    return {name: kept for kept in narrowed if kept for name in outputs}


def _carry_over(graph: Graph, plan: Plan) -> tuple[Plan, list[str]]:
    """The plan for the twin, by pattern, and the patterns that the twin lacks."""
    missing: list[str] = []
    steps: list[Step] = []
    for step in plan.steps:
        rewrite, form = rewrites()[step.rewrite], form_of(plan.form)
        wanted = {pattern(where) for where in step.sites}
        found = [site for site in rewrite.find(graph, form) if site.refused is None and pattern(site.where) in wanted]
        missing += [f"{step.rewrite} at {p}" for p in sorted(wanted - {pattern(site.where) for site in found})]
        graph = rewrite.apply(graph, found, form)
        steps.append(Step(step.rewrite, tuple(site.where for site in found)))
    return replace(plan, steps=tuple(steps)), missing


def _unproved(plan: Plan, reason: str) -> Evidence:
    sites = sorted({f"{step.rewrite} at {pattern(where)}" for step in plan.steps for where in step.sites})
    return Evidence(False, exactness(plan).name, float("nan"), float("nan"), "", unproved=sites, notes=[reason])
