"""What the steps of a plan save: predicted from shapes, and measured where the machine is at hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import architectures
import pytest
import scales
import torch
from test_floors import run

import taut
from taut import machine, prices
from taut.checkpoint import BadInput
from taut.machine import Figure, Machine
from taut.ops.linear import linear
from taut.plans import Plan, Step, make_plan
from taut.prices import Measured
from taut.rewrite import TAUT, rewrites
from taut.runtime.contest import EngineContest, engine_contest

MODEL = str(Path(__file__).parent.parent / "taut/demo/model")
MACHINE = Machine("m", "cpu", {"float32": Figure(1e9)}, {"memory": Figure(10.0)}, {}, Figure(0.5))


@pytest.fixture
def here(tmp_path, monkeypatch) -> Machine:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine.cache_file().parent.mkdir(parents=True)
    machine.cache_file().write_text(json.dumps(dataclasses.asdict(MACHINE)))
    return MACHINE


def test_predicted_savings_are_those_counted_by_hand():
    graph = scales.traced("llama")[1]
    plan = prices.predict(graph, make_plan(graph, "taut", ["fold_norm", "merge_linears"]), MACHINE, step=True)
    decode = {price.rewrite: price for price in plan.prices if price.workload == "decode"}
    assert decode["fold_norm"].bytes == 4 * 48 * 4
    assert decode["merge_linears"].calls == 2 * (2 + 1)
    assert decode["merge_linears"].bytes == 2 * (2 + 1) * 48 * 4
    merged = decode["merge_linears"]
    assert merged.seconds == pytest.approx(merged.bytes / 10.0 + 0.5 * merged.calls)
    assert 0 < merged.share < 1
    assert plan.prices[0].workload == "decode"
    assert [p.rewrite for p in plan.prices[:2]] == ["fold_norm", "merge_linears"] or plan.prices[0].seconds >= 76


def test_a_plan_with_prices_is_saved_and_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # this machine may have been measured
    made = taut.plan(MODEL, machine="h200-sxm")
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made
    bare = taut.plan(architectures.build("llama"))
    assert "prices" not in bare.as_dict()
    assert Plan.from_dict(json.loads(json.dumps(bare.as_dict()))) == bare


def test_steps_that_measure_slower_are_dropped_with_the_times(monkeypatch, here):
    """merge_linears seems slower; what was found on its result is then tried on the graph without it."""

    def seems(self, candidate):
        merged = len(list(candidate.calls(linear))) < len(list(self.graph.calls(linear)))
        return Measured(1e-3, 2e-3, slower=merged)

    monkeypatch.setattr(EngineContest, "compare", seems)
    model = architectures.build("llama")
    made = taut.plan(model, form="taut", only=["fold_norm", "merge_linears"], measure=True)
    assert [step.rewrite for step in made.steps] == ["fold_norm"]
    reasons = {r.reason for r in made.refused if r.rewrite == "merge_linears"}
    assert len(reasons) == 1
    assert "measured slower here" in reasons.pop()
    assert {p.rewrite: p.kept for p in made.prices} == {"fold_norm": True, "merge_linears": False}
    assert all((p.measured_before is not None) == (p.workload == "decode") for p in made.prices)
    rewritten = taut.apply(model, made)
    assert taut.verify(model, rewritten).passed


def test_the_engine_is_timed_where_there_is_one(here):
    model = architectures.build("llama")
    made = taut.plan(model, form="taut", only=["fold_norm", "defer_norm", "int8_weights"], measure=True)
    assert made.measured is not None
    assert "on the engine" in made.measured
    decode = {price.rewrite: price for price in made.prices if price.workload == "decode"}
    assert decode["int8_weights"].measured_before is not None
    assert decode["defer_norm"].measured_before is None  # fused by the engine in any case
    assert "defer_norm" in [step.rewrite for step in made.steps]
    assert Plan.from_dict(json.loads(json.dumps(made.as_dict()))) == made


def test_where_there_is_no_engine_the_graph_is_timed_and_told(here):
    for name, reason in (("vit", "does not decode"), ("mamba", "there is no engine")):
        made = taut.plan(architectures.build(name), form="taut", measure=True)
        assert made.measured is not None
        assert "on the graph" in made.measured
        assert reason in made.measured


def test_the_program_with_a_step_is_the_same_function(here):
    """Both compiled programs, fed the same tokens; in eight bits it is another one."""
    model = architectures.build("gpt2_untied")
    contest = engine_contest(model, "taut")
    for name in ("fold_norm", "merge_linears", "int8_weights"):
        sites = [s for s in rewrites()[name].find(contest.graph, TAUT) if s.refused is None]
        if not sites:
            continue
        candidate = contest.candidate(Step(name, tuple(site.where for site in sites)))
        if candidate is None:
            continue
        before = contest.engine.bytes_a_step()
        one = contest.engine.decode([5]).clone()
        contest.take(candidate)
        two = contest.engine.decode([5])
        error = float((one - two).norm() / one.norm())
        assert error < (0.05 if name == "int8_weights" else 1e-5)
        assert (contest.engine.bytes_a_step() < 0.5 * before) == (name == "int8_weights")


def test_slower_is_told_from_noise():
    _, lifted, inputs = scales.traced("llama")
    same = prices.compare(lifted, lifted, inputs)
    assert same.before > 0

    def body(m, x, times=1):
        for _ in range(times):
            x = torch.tanh(x @ x.mT @ x)
        return x

    once = scales.hand_made(body, width=64)
    often = scales.hand_made(lambda m, x: body(m, x, 40), width=64)
    assert prices.compare(once[1], often[1], once[2]).slower
    assert not prices.compare(often[1], once[1], once[2]).slower


def test_the_measured_graph_computes_the_same():
    _, lifted, inputs = scales.traced("gpt2")
    expected = lifted.run(inputs)
    for name, found in zip(lifted.outputs, prices.runner(lifted, inputs)(), strict=True):  # type: ignore[arg-type]
        assert torch.allclose(found, expected[name], atol=1e-4)


def test_only_the_machine_at_hand_can_be_measured(here):
    with pytest.raises(BadInput, match="not the machine at hand"):
        taut.plan(MODEL, machine="h200-sxm", measure=True)


def test_prices_for_people(here):
    printed = run("plan", MODEL, "--machine", "h200-sxm", "--form", "taut", "--only", "merge_linears")
    assert "predicted on NVIDIA H200 SXM" in printed
    assert "-18 calls" in printed
    assert "measured" in run("plan", MODEL, "--measure")
