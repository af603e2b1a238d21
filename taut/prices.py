"""What each step of a plan saves: predicted on any machine from shapes, measured on this one by running both graphs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from taut.cost import Cost, costs
from taut.graph import Graph
from taut.machine import Machine
from taut.plans import BadPlan, Plan, Price, Refusal, Step, apply_step

ROUNDS = 15
CHANCE = 0.05
"""A step is dropped when chance alone would make it lose as many rounds less often than this."""


@dataclass(frozen=True)
class Measured:
    """Seconds of one forward pass before and after a step, in the same rounds."""

    before: float
    after: float
    slower: bool


def predict(graph: Graph, plan: Plan, machine: Machine, step: bool, dtype: torch.dtype | None = None) -> Plan:
    """The plan with the predicted saving of each step on a machine, those that save most first.

    Each call takes its least time, and the machine's cost of a call where that is known. `graph` is the lifted graph
    that the plan was made for, `dtype` that of its float32 values; `step` says that the model generates.
    """
    before, prices = costs(graph, step, dtype), []
    for number, change in enumerate(plan.steps):
        graph = apply_step(graph, change, plan.form)
        after = costs(graph, step, dtype)
        prices += [_price(number, change.rewrite, b, a, machine) for b, a in zip(before, after, strict=True)]
        before = after
    order = [found.workload.name for found in before]
    ranked = sorted(prices, key=lambda price: (order.index(price.workload), -price.seconds))
    return replace(plan, machine=machine.name, prices=tuple(ranked))


def _price(step: int, rewrite: str, before: Cost, after: Cost, machine: Machine) -> Price:
    had, has = before.work, after.work
    saved = _seconds(before, machine) - _seconds(after, machine)
    calls = len(before.items) - len(after.items)
    share = saved / _seconds(before, machine)
    bytes, flops = had.bytes - has.bytes, had.flops - has.flops
    return Price(step, rewrite, before.workload.name, bytes, flops, calls, saved, share)


def _seconds(cost: Cost, machine: Machine) -> float:
    overhead = machine.call.value * len(cost.items) if machine.call else 0.0
    return cost.one_by_one(machine) + overhead


class Contest(Protocol):
    """What a plan's steps are timed on: it takes one step after the other.

    `candidate` gives it with one more step, None where that makes no difference to what is timed, and raises BadPlan
    where it does not fit. `workload` is what is timed, None for a forward pass; `told` says it for people.
    """

    workload: str | None
    told: str

    def candidate(self, step: Step) -> Graph | None: ...
    def compare(self, candidate: Graph) -> Measured: ...
    def take(self, candidate: Graph) -> None: ...


class GraphContest:
    """The whole graph in torch, every op by its fastest implementation."""

    workload: str | None = None

    def __init__(self, graph: Graph, inputs: Mapping[str, Tensor], form: str, why: str) -> None:
        self.graph, self.inputs, self.form = graph, inputs, form
        self.told = f"on the graph, a forward pass in torch, since {why}"

    def candidate(self, step: Step) -> Graph | None:
        return apply_step(self.graph, step, self.form)

    def compare(self, candidate: Graph) -> Measured:
        return compare(self.graph, candidate, self.inputs)

    def take(self, candidate: Graph) -> None:
        self.graph = candidate


def keep_what_pays(contest: Contest, plan: Plan, progress: Callable[[str, int, int], None] | None = None) -> Plan:
    """The plan without the steps that measure slower, on this machine.

    Each step is measured on what the kept ones before it left. A dropped one, and one whose places went with it, is
    refused with the times; one that makes no difference to what is timed stays, unmeasured.
    """
    kept, refused = [], list(plan.refused)
    times: dict[int, Measured] = {}
    for number, step in enumerate(plan.steps):
        if progress:
            progress(f"measuring {step.rewrite}", number, len(plan.steps))
        try:
            candidate = contest.candidate(step)
        except BadPlan as error:
            refused += [Refusal(step.rewrite, where, f"a step before it was dropped: {error}") for where in step.sites]
            continue
        if candidate is None:
            kept.append(step)
            continue
        found = times[number] = contest.compare(candidate)
        if found.slower:
            reason = f"measured slower here: {1e3 * found.after:.3g} ms against {1e3 * found.before:.3g} ms"
            refused += [Refusal(step.rewrite, where, reason) for where in step.sites]
        else:
            kept.append(step)
            contest.take(candidate)
    prices = tuple(_with_times(price, times.get(price.step), contest.workload) for price in plan.prices)
    return replace(plan, steps=tuple(kept), refused=tuple(refused), prices=prices, measured=contest.told)


def _with_times(price: Price, found: Measured | None, workload: str | None) -> Price:
    if found is None:
        return price
    if workload not in (None, price.workload):
        return replace(price, kept=not found.slower)
    return replace(price, measured_before=found.before, measured_after=found.after, kept=not found.slower)


def compare(before: Graph, after: Graph, inputs: Mapping[str, Tensor], rounds: int = ROUNDS) -> Measured:
    """Run both graphs in turn; `slower` says that the second one lost more rounds than chance explains."""
    one, two = (runner(graph, inputs) for graph in (before, after))
    return timed(one, two, rounds)


def timed(before: Callable[[], object], after: Callable[[], object], rounds: int = ROUNDS) -> Measured:
    """Run both in turn; `slower` as above."""
    runs = (before, after)
    for run in runs:
        run()
    pairs = [[_timed(run) for run in runs] for _ in range(rounds)]
    lost = sum(b > a for a, b in pairs)
    chance = sum(math.comb(rounds, k) for k in range(lost, rounds + 1)) / 2**rounds
    return Measured(median(a for a, _ in pairs), median(b for _, b in pairs), chance < CHANCE)


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def runner(graph: Graph, inputs: Mapping[str, Tensor]) -> Callable[[], object]:
    """Run the graph with its parameters in memory, every op by its fastest implementation."""
    placed = graph.copy()
    device = next(iter(inputs.values())).device
    for node in placed.nodes:
        node.args = _on(device, node.args)
        node.kwargs = _on(device, dict(node.kwargs))
    values = [_value(graph, inputs, n.meta["kind"], n.meta["tensor"]) for n in placed.nodes if n.op == "placeholder"]
    interpreter = fx.Interpreter(torch.nn.Module(), graph=placed.fx)

    def run() -> object:
        with torch.inference_mode():
            return interpreter.run(*values, enable_io_processing=False)

    return run


def _value(graph: Graph, inputs: Mapping[str, Tensor], kind: str, name: str) -> Tensor:
    if kind == "parameter":
        return graph.evaluate(name, None)
    return graph.tensors[name] if kind == "buffer" else inputs[name]


def _on(device: torch.device, value: Any) -> Any:
    """A device recorded when tracing becomes the one that is run on."""
    if isinstance(value, dict):
        return {key: _on(device, v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on(device, v) for v in value)
    return device if isinstance(value, torch.device) else value
