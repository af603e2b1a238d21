"""Soundness: on random small transformers no rewrite, in any order, changes what the model computes.

The judge is independent of taut: the module itself, run by torch in true float64.
"""

from __future__ import annotations

import random

import independent
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from random_models import Block, Chain, Model, Spec, example, specs
from torch import Tensor, nn

from taut.graph import Graph
from taut.lift import lift
from taut.plans import plan_and_apply
from taut.proof import prove
from taut.rewrite import STOCK, TAUT, Exactness, Rewrite, rewrites
from taut.tracing import trace

SAME = 1e-12
Inputs = dict[str, Tensor]


def truth(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    return independent.outputs(model, inputs)


def computed(graph: Graph, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        return list(graph.run(inputs, float64=True).values())


def error(one: list[Tensor], true: list[Tensor]) -> float:
    """Largest difference over largest value, over all outputs."""
    assert [t.shape for t in one] == [t.shape for t in true]
    pairs = [(a, b) for a, b in zip(one, true, strict=True) if b.numel()]
    return max(((a - b).abs().max() / b.abs().max().clamp_min(1e-300)).nan_to_num(nan=1e9).item() for a, b in pairs)


def well_posed(model: nn.Module, inputs: Inputs, true: list[Tensor]) -> bool:
    """Whether rounding alone moves the outputs by less than the check can tell: no ties, nothing that blows up."""
    if not all(bool(torch.isfinite(t).all()) for t in true):
        return False
    noisy = independent.copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in noisy.parameters():
            noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) - 0.5
            parameter.mul_(1.0 + 2e-15 * noise)
    return error(truth(noisy, inputs), true) < SAME / 10


class Judge:
    """A model, what it truly computes, and its graph."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.model, self.inputs = model.eval(), inputs
        self.true = truth(model, inputs)
        self.raw = trace(model, inputs)
        self.lifted = lift(self.raw)
        self.applied = 0

    def check(self, graph: Graph, done: object) -> None:
        for name, tensor in self.raw.tensors.items():
            if name in graph.values:
                assert graph.evaluate(name).shape == tensor.shape, (name, done)
        off = error(computed(graph, self.inputs), self.true)
        if off > SAME and well_posed(self.model, self.inputs, self.true):
            pytest.fail(f"off by {off:.1e} after {done}\n{self.lifted}")

    def check_all(self, seed: int = 0) -> None:
        self.check(self.lifted, "lift")
        for form in ("stock", "taut"):
            plan, after = plan_and_apply(self.lifted, form)
            done = [(step.rewrite, step.sites) for step in plan.steps]
            self.applied += plan.applied
            self.check(after, done)
            self.check_twice(after, form)
        self.check_random_order(random.Random(seed))

    def check_twice(self, after: Graph, form: str) -> None:
        """What a plan has applied it finds applied; only a merge may become possible, of layers that lost a bias."""
        again, _ = plan_and_apply(after, form)
        steps = [step for step in again.steps if step.rewrite != "merge_linears"]
        assert not steps, steps

    def check_random_order(self, rng: random.Random, steps: int = 4) -> None:
        graph, done = self.lifted, []
        exact = [r for r in rewrites().values() if r.exactness in (Exactness.BITWISE, Exactness.ALGEBRAIC) and not r.promises]
        for _ in range(steps):
            rewrite, form = rng.choice(exact), rng.choice([STOCK, TAUT])
            where = some_sites(rewrite, graph, form, rng)
            if not where:
                continue
            try:
                graph = rewrite.apply(graph, where, form)
            except ValueError as reason:
                assert "both or neither" in str(reason), (done, rewrite.name, where, reason)
                continue
            done.append((rewrite.name, form.name, where))
            self.check(graph, done)


def some_sites(rewrite: Rewrite, graph: Graph, form, rng: random.Random) -> list[str]:
    """Some of the sites that are not refused; finding them twice finds the same, and a refusal says why."""
    sites = rewrite.find(graph, form)
    assert [(s.where, s.refused) for s in rewrite.find(graph, form)] == [(s.where, s.refused) for s in sites]
    assert all(s.refused is None or s.refused.strip() for s in sites)
    free = [s.where for s in sites if s.refused is None]
    return free if rng.random() < 0.5 else [where for where in free if rng.random() < 0.5]
