"""The step of a checkpoint in taut form: the original's, with the plan's changes of parameters and not of structure.

What a rewrite changes in the structure alone, such as a deferred division, is the same function with the same
parameters, and the engine fuses better without it. So a plan's step is kept where it changes parameters, and what is
kept as codes is put in as the values that they stand for.
"""

from __future__ import annotations

from collections.abc import Collection

from taut.checkpoint.errors import BadInput
from taut.graph import Graph
from taut.lossy import with_values
from taut.plans import BadPlan, Plan, Step, apply_step, form_of
from taut.rewrite import Bound, rewrites
from taut.values import Filled, Original, Value


def replayed(graph: Graph, plan: Plan, stored: Collection[str]) -> Graph:
    """The lifted step as a plan left it, its parameters by the names of the `stored` tensors.

    Raises BadInput where the plan does not fit the step, and where a parameter that it needs is not stored.
    """
    try:
        graph = _followed(graph, plan, structure=False)
    except BadPlan:
        graph = _with_structure(graph, plan)
    graph = with_values(graph, {name: Original(name) for name in graph.values if name in stored})
    lost = [name for name, value in graph.values.items() if name not in stored and not _is_known(value)]
    if lost:
        raise BadInput(f"{lost[0]} is not in the checkpoint", "apply taut to the original again")
    return graph


def _with_structure(graph: Graph, plan: Plan) -> Graph:
    """Where a later step needs what an earlier one did to the structure alone, that is done too."""
    try:
        return _followed(graph, plan, structure=True)
    except BadPlan as error:
        cause = f"a step of the plan does not fit the decoding step: {error}"
        raise BadInput(cause, "compile the original or its stock form, which the engine fuses by itself") from error


def _followed(graph: Graph, plan: Plan, structure: bool) -> Graph:
    for step in plan.steps:
        after = apply_step(graph, step, plan.form)
        bound = rewrites()[step.rewrite].bound
        if bound is not None:
            graph = _left(graph, step, plan.form, bound)
        elif structure or not structure_alone(graph, after):
            graph = after
    return graph


def _left(graph: Graph, step: Step, form: str, bound: Bound) -> Graph:
    """What a lossy step leaves of the values, in terms of the tensors that it stored."""
    left: dict[str, Value] = {}
    for site in rewrites()[step.rewrite].find(graph, form_of(form)):
        if site.where in step.sites:
            left |= bound.decoded(site, Original)
    return with_values(graph, left)


def structure_alone(before: Graph, after: Graph) -> bool:
    """Whether no parameter has changed; some that were folded to a constant may have gone."""
    kept = {name: value for name, value in before.values.items() if name in after.values}
    gone = [value for name, value in before.values.items() if name not in after.values]
    return after.values == kept and all(isinstance(value, Filled) for value in gone)


def _is_known(value: Value) -> bool:
    """Whether a value needs no tensor of its own name: a constant, or what codes stand for."""
    return isinstance(value, Filled) or (not isinstance(value, Original) and bool(value.children()))
