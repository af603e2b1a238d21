"""A plan: which rewrites at which sites, and what was refused. Plain JSON, made from shapes alone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from taut import __version__
from taut.graph import Graph
from taut.rewrite import STEP, STOCK, TAUT, Form, Rewrite, Site, rewrites
from taut.tracing import OUTPUTS
from taut.whole_file import write_text

SCHEMA = 1
FORMS = {form.name: form for form in (STOCK, TAUT)}
"""What a plan may make of a model."""


class BadPlan(ValueError):
    """The plan does not fit this model, or is no plan."""


@dataclass(frozen=True)
class Step:
    """One rewrite and the module paths at which it is applied."""

    rewrite: str
    sites: tuple[str, ...]


@dataclass(frozen=True)
class Refusal:
    rewrite: str
    where: str
    reason: str


@dataclass(frozen=True)
class Price:
    """What step number `step` of a plan saves of a workload (see `taut/cost.py`), predicted from shapes.

    `seconds` on the plan's machine, and `share` of what the graph took before the step. The measured seconds are those
    of a forward pass before and after it.
    """

    step: int
    rewrite: str
    workload: str
    bytes: float
    flops: float
    calls: int
    seconds: float
    share: float
    measured_before: float | None = None
    measured_after: float | None = None
    kept: bool = True


@dataclass(frozen=True)
class Plan:
    """Steps in the order in which they are applied; `refused` says why each other site was left alone.

    `prices` say what each step saves on `machine`, where one was named; `measured` says what was timed, if anything.
    """

    form: str
    outputs: str
    steps: tuple[Step, ...] = ()
    refused: tuple[Refusal, ...] = ()
    absent: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA
    version: str = __version__
    machine: str | None = None
    prices: tuple[Price, ...] = ()
    measured: str | None = None

    @property
    def applied(self) -> int:
        return sum(len(step.sites) for step in self.steps)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; what a plan without prices does not have is left out."""
        unsaid = (*(() if self.machine else ("machine", "prices")), *(() if self.measured else ("measured",)))
        return {key: value for key, value in asdict(self).items() if key not in unsaid}

    def save(self, path: Path) -> None:
        """Raises BadInput where the file cannot be written."""
        write_text(path, json.dumps(self.as_dict(), indent=2, sort_keys=True) + "\n")

    @staticmethod
    def from_dict(record: Any) -> Plan:
        """Raises BadPlan for what is no plan, or one of a later schema."""
        try:
            if record["schema"] > SCHEMA:
                raise BadPlan(f"the plan has schema {record['schema']}; this taut reads up to {SCHEMA}: upgrade taut")
            steps = tuple(Step(s["rewrite"], tuple(s["sites"])) for s in record["steps"])
            refused = tuple(Refusal(**r) for r in record.get("refused", ()))
            form, outputs = record["form"], record["outputs"]
            if form not in FORMS or outputs not in OUTPUTS:
                raise KeyError(form, outputs)
            prices = tuple(Price(**price) for price in record.get("prices", ()))
            absent, told = dict(record.get("absent", {})), {"machine": record.get("machine"), "prices": prices}
            return Plan(form, outputs, steps, refused, absent, **told, measured=record.get("measured"))
        except (KeyError, TypeError) as error:
            raise BadPlan(f"this is not a plan that `taut plan` made: {error!r}") from error

    @staticmethod
    def load(path: Path) -> Plan:
        try:
            return Plan.from_dict(json.loads(path.read_text()))
        except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise BadPlan(f"cannot read a plan from {path}: {error}") from error


def form_of(name: str) -> Form:
    """Raises BadPlan for an unknown name."""
    if name not in FORMS:
        raise BadPlan(f"no form {name!r}: take one of {', '.join(FORMS)}")
    return FORMS[name]


def choose(only: Iterable[str] | None, form: Form) -> list[Rewrite]:
    """The rewrites to try, in order: those named, or all that need not be asked for. Raises BadPlan."""
    known = rewrites()
    if only is None:
        return [r for r in known.values() if form in r.forms and not r.asked]
    wanted = list(only)
    for name in wanted:
        if name not in known:
            raise BadPlan(f"there is no rewrite {name!r}; there are {', '.join(known)}")
        if known[name].forms == (STEP,):
            raise BadPlan(f"{name} is applied when a model is compiled for decoding, and never to a checkpoint")
        if form not in known[name].forms:
            raise BadPlan(f"{name} changes the structure of the model and so needs --form taut")
    return [rewrite for name, rewrite in known.items() if name in wanted]


def make_plan(graph: Graph, form: str = "stock", only: Iterable[str] | None = None, outputs: str = "all") -> Plan:
    """Find every site of every rewrite in a lifted graph, each rewrite on what the ones before it left."""
    return plan_and_apply(graph, form, only, outputs)[0]


def plan_and_apply(
    graph: Graph, form: str = "stock", only: Iterable[str] | None = None, outputs: str = "all"
) -> tuple[Plan, Graph]:
    """A plan for the graph, and the graph as the plan makes it.

    What one rewrite leaves may be another's chance, so all are tried again until none finds anything: a second plan
    for the result is empty. The refusals are those of the first round that no later one took back.
    """
    shape = form_of(form)
    tried = choose(only, shape)
    graph, steps, refused = _round(graph, tried, shape)
    absent = {rewrite.name: rewrite.absent for rewrite in tried if rewrite.name not in refused}
    more = steps
    while more:
        graph, more, _ = _round(graph, tried, shape)
        steps += more
    done = {(step.rewrite, where) for step in steps for where in step.sites}
    kept = tuple(r for refusals in refused.values() for r in refusals if (r.rewrite, r.where) not in done)
    return Plan(form, outputs, tuple(steps), kept, absent), graph


def _round(graph: Graph, tried: list[Rewrite], form: Form) -> tuple[Graph, list[Step], dict[str, list[Refusal]]]:
    """Apply each rewrite to what the ones before it left. The refusals are by rewrite, for those that found a site."""
    steps, refused = [], {}
    for rewrite in tried:
        sites = rewrite.find(graph, form)
        chosen = tuple(site.where for site in sites if site.refused is None)
        if sites:
            refused[rewrite.name] = [Refusal(rewrite.name, s.where, s.refused) for s in sites if s.refused is not None]
        if chosen:
            graph = rewrite.apply(graph, chosen, form)
            steps.append(Step(rewrite.name, chosen))
    return graph, steps, refused


def follow(graph: Graph, plan: Plan) -> Graph:
    """Apply a recorded plan to a lifted graph. Raises BadPlan where it does not fit."""
    for step in plan.steps:
        graph = apply_step(graph, step, plan.form)
    return graph


def apply_step(graph: Graph, step: Step, form: str) -> Graph:
    """Apply one step of a plan. Raises BadPlan where it does not fit."""
    known = rewrites()
    if step.rewrite not in known:
        raise BadPlan(f"the plan uses the rewrite {step.rewrite!r}, which this taut does not have")
    try:
        return known[step.rewrite].apply(graph, step.sites, form_of(form))
    except ValueError as error:
        raise BadPlan(str(error)) from error


def all_sites(graph: Graph, form: str = "taut") -> list[tuple[str, Site]]:
    """Every site of every rewrite on the graph as it is: what `inspect` shows."""
    shape = form_of(form)
    with graph.unchanging():
        return [(r.name, site) for r in rewrites().values() for site in r.find(graph, shape)]
