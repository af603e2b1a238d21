"""The judge of soundness: the module itself, run by torch in true float64; nothing of taut has a say."""

from __future__ import annotations

import copy
import random
from typing import Any

import independent
import pytest
import torch
from torch import Tensor, nn

from taut.graph import Graph
from taut.lift import lift
from taut.plans import plan_and_apply
from taut.rewrite import STOCK, TAUT, Exactness, Form, Rewrite, rewrites
from taut.tracing import trace

SAME = 1e-12
Inputs = dict[str, Tensor]


def computed(graph: Graph, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        return list(graph.run(inputs, float64=True).values())


def error(one: list[Tensor], true: list[Tensor]) -> float:
    """Largest difference over largest value, over all outputs."""
    assert [t.shape for t in one] == [t.shape for t in true]
    tiny = torch.finfo(torch.float64).tiny
    pairs = [(a, b) for a, b in zip(one, true, strict=True) if b.numel()]
    off = [((a - b).abs().max() / b.abs().max().clamp_min(tiny)).item() for a, b in pairs]
    return max((float("inf") if e != e else e for e in off), default=0.0)


def shaken(value: Any, generator: torch.Generator) -> Any:
    """A value with changes in its last bit; two that are equal are so no longer."""
    if not isinstance(value, Tensor) or value.dtype != torch.float64:
        return value
    noise = torch.rand(value.shape, generator=generator, dtype=torch.float64) - 0.5
    return value * (1.0 + 2e-15 * noise)


class Judge:
    """A model, what it truly computes, and its graph."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.model, self.inputs = model.eval(), inputs
        self.true = independent.outputs(self.model, inputs)
        self.raw = trace(self.model, inputs)
        self.lifted = lift(self.raw)
        self.applied = 0

    def check(self, graph: Graph, done: object) -> None:
        for name, tensor in self.raw.tensors.items():
            if name in graph.values:
                assert graph.evaluate(name).shape == tensor.shape, (name, done)
        off = error(computed(graph, self.inputs), self.true)
        if off > SAME and self.well_posed():
            pytest.fail(f"off by {off:.1e} after {done}\n{self.lifted}")

    def well_posed(self) -> bool:
        """Whether changes in the last bit, of parameters or on the way, move the outputs by less than can be told."""
        if not all(bool(torch.isfinite(t).all()) for t in self.true):
            return False
        generator = torch.Generator().manual_seed(2)
        noisy = copy.deepcopy(self.model).double()
        with torch.no_grad():
            for parameter in noisy.parameters():
                parameter.copy_(shaken(parameter, generator))
            on_the_way = self.raw.run(self.inputs, float64=True, watch=lambda node, value, _: shaken(value, generator))
        moved = error(independent.outputs(noisy, self.inputs), self.true), error(list(on_the_way.values()), self.true)
        return max(moved) < SAME / 10

    def check_all(self, seed: int = 0) -> None:
        self.check(self.lifted, "lift")
        for form in ("stock", "taut"):
            plan, after = plan_and_apply(self.lifted, form)
            self.applied += plan.applied
            self.check(after, plan.steps)
            self.check_twice(after, form)
        rng = random.Random(seed)
        self.check_random_order(rng)
        self.check_weaker_promises()

    def check_twice(self, after: Graph, form: str) -> None:
        """A second plan finds nothing."""
        again, _ = plan_and_apply(after, form)
        assert not again.steps, again.steps

    def check_random_order(self, rng: random.Random, steps: int = 4) -> None:
        graph, done = self.lifted, []
        exact = [r for r in rewrites().values() if r.exactness is Exactness.ALGEBRAIC and not r.promises]
        for _ in range(steps):
            rewrite, form = rng.choice(exact), rng.choice([STOCK, TAUT])
            where = some_sites(rewrite, graph, form, rng)
            if where:
                graph, before = applied(rewrite, graph, where, form), graph
                if graph is not before:
                    done.append((rewrite.name, form.name, where))
                    self.check(graph, done)

    def check_alone(self) -> None:
        """Every site of every exact rewrite by itself."""
        for rewrite in rewrites().values():
            if rewrite.exactness is Exactness.ALGEBRAIC and not rewrite.promises:
                for form in (STOCK, TAUT):
                    for site in rewrite.find(self.lifted, form):
                        if site.refused is None:
                            after = applied(rewrite, self.lifted, [site.where], form)
                            self.check(after, (rewrite.name, form.name, site.where))

    def check_weaker_promises(self) -> None:
        """The largest logit stays; a bound that comes from epsilon is nothing where epsilon is."""
        largest = rewrites()["drop_final_scale_for_argmax"].apply(self.lifted)
        for name, one, true in zip(self.raw.outputs, computed(largest, self.inputs), self.true, strict=True):
            if name == "logits" and self.well_posed():
                assert torch.equal(one.argmax(-1), true.argmax(-1))
            elif name != "logits":
                assert error([one], [true]) <= SAME or not self.well_posed()
        if getattr(getattr(self.model, "spec", None), "eps", 1.0) < 1e-20:
            self.check(rewrites()["cancel_norm_plain"].apply(self.lifted), "cancel_norm_plain")


def applied(rewrite: Rewrite, graph: Graph, where: list[str], form: Form) -> Graph:
    """The graph after a rewrite; as it is where the sites chosen must go with others."""
    try:
        return rewrite.apply(graph, where, form)
    except ValueError as reason:
        if "both or neither" in str(reason):
            return graph
        raise


def some_sites(rewrite: Rewrite, graph: Graph, form: Form, rng: random.Random) -> list[str]:
    """Some of the sites that are not refused; finding them twice finds the same, and a refusal says why."""
    sites = rewrite.find(graph, form)
    assert [(s.where, s.refused) for s in rewrite.find(graph, form)] == [(s.where, s.refused) for s in sites]
    assert all(s.refused is None or s.refused.strip() for s in sites)
    free = [s.where for s in sites if s.refused is None]
    return free if rng.random() < 0.5 else [where for where in free if rng.random() < 0.5]
