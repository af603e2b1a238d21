"""Soundness: on random small transformers no rewrite, in any order, changes what the model computes.

The judge is independent of taut: the module itself, run by torch in true float64.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import independent
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from random_models import Model, Spec, example, specs
from torch import Tensor, nn

from taut.graph import Graph
from taut.lift import lift
from taut.plans import plan_and_apply
from taut.proof import prove
from taut.rewrite import STOCK, TAUT, Exactness, Form, Rewrite, rewrites
from taut.tracing import trace
from taut.values import Affine

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


def well_posed(model: nn.Module, inputs: Inputs, true: list[Tensor]) -> bool:
    """Whether changes in the last bit of the parameters move the outputs by less than the check can tell."""
    if not all(bool(torch.isfinite(t).all()) for t in true):
        return False
    noisy = copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in noisy.parameters():
            noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) - 0.5
            parameter.mul_(1.0 + 2e-15 * noise)
    return error(independent.outputs(noisy, inputs), true) < SAME / 10


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
        if off > SAME and well_posed(self.model, self.inputs, self.true):
            pytest.fail(f"off by {off:.1e} after {done}\n{self.lifted}")

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
            if name == "logits" and well_posed(self.model, self.inputs, self.true):
                assert torch.equal(one.argmax(-1), true.argmax(-1))
            elif name != "logits":
                assert error([one], [true]) <= SAME
        if getattr(self.model, "spec", Spec(())).eps < 1e-20:
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


def examples(count: int):
    """Always the same random models."""
    phases = (Phase.explicit, Phase.generate, Phase.shrink)
    quiet = list(HealthCheck)
    return settings(
        max_examples=count, derandomize=True, deadline=None, database=None, phases=phases, suppress_health_check=quiet
    )


def check_random_models(count: int) -> None:
    """Sound on every one of them, and not because nothing was done: two in three have a site that is applied."""
    changed: list[bool] = []

    @examples(count)
    @given(specs())
    def check(spec: Spec) -> None:
        judge = Judge(Model(spec), example(spec))
        judge.check_all(len(changed))
        changed.append(judge.applied > 0)

    check()
    assert len(changed) >= count / 2
    assert sum(changed) > 2 / 3 * len(changed)


def test_no_rewrite_changes_a_random_model():
    check_random_models(200)


@pytest.mark.slow
def test_no_rewrite_changes_any_of_ten_thousand_random_models():
    check_random_models(10_000)


def test_the_proof_fails_when_any_rewritten_tensor_is_off_by_a_hundredth():
    failed: list[str] = []

    @examples(15)
    @given(specs())
    def check(spec: Spec) -> None:
        judge = Judge(Model(spec), example(spec))
        _, after = plan_and_apply(judge.lifted, "taut")
        for name in list(after.changed())[:4]:
            wrong = after.copy()
            value = after.values[name]
            wrong.values[name] = Affine(value, 1.01, 0.0 if bool(after.evaluate(name).any()) else 0.01)
            if error(computed(wrong, judge.inputs), judge.true) > 2 * SAME:
                assert not prove(judge.raw, wrong, [judge.inputs], movement=False).passed, name
                failed.append(name)

    check()
    assert len(failed) >= 20


WIDTH, TOKENS = 8, 6
L = nn.Linear


class Trap(nn.Module):
    """A norm, and a body that reads it in a way that is easily taken for another."""

    def __init__(self, body: Callable[[Trap, Tensor], Tensor], norm: nn.Module | None = None, **parts) -> None:
        super().__init__()
        self.body, self.norm = body, norm or nn.RMSNorm(WIDTH, eps=1e-5)
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(0.5 * part) if isinstance(part, Tensor) else part)
        with torch.no_grad():
            for parameter in self.norm.parameters():
                parameter.add_(0.5 * torch.randn_like(parameter))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.body(self, self.norm(x))}


class Gained(nn.Module):
    """An RMSNorm whose gain is some function of its parameter."""

    def __init__(self, gain: Callable[[Tensor], Tensor], value: float = 1.0, size: int = WIDTH) -> None:
        super().__init__()
        self.gain, self.weight = gain, nn.Parameter(torch.full((size,), value))

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., : len(self.weight)]
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.gain(self.weight)


class OneForBoth(nn.Module):
    """A LayerNorm whose bias is its gain."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (WIDTH,), self.weight, self.weight)


def r(*size: int) -> Tensor:
    return torch.randn(size)


def layer_norm() -> nn.Module:
    return nn.LayerNorm(WIDTH)


def transposed_in_storage() -> nn.Module:
    """Two square parameters in one storage, one the transpose of the other: they are not tied."""
    trap = Trap(lambda m, y: F.linear(F.linear(y, m.a), m.b), a=r(8, 8))
    trap.b = nn.Parameter(trap.a.data.t())
    return trap


def twice_masked(m: Trap, y: Tensor) -> Tensor:
    """Two masks that together hide all keys from the first queries: these see all keys alike."""
    least = torch.finfo(torch.float32).min
    scores = y[:, None] @ y[:, None].transpose(-1, -2)
    scores = scores.masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), least)
    return m.a(scores.masked_fill((torch.arange(TOKENS) < 2)[None], least).softmax(-1) @ y[:, None])


def ten(x: Tensor) -> Tensor:
    x = 40.0 * x
    return torch.relu(x) + torch.relu(x + -10.0) * -1.0


# A model, and whether fold_norm may do anything.
TRAPS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "cast to integers": (lambda: Trap(lambda m, y: m.a((4 * y).to(torch.int32).to(y.dtype)), a=L(8, 4)), False),
    "cast to eight bits": (lambda: Trap(lambda m, y: m.a(y.to(torch.float8_e4m3fn).to(y.dtype)), a=L(8, 4)), False),
    "cast to bool": (lambda: Trap(lambda m, y: m.a(y.bool().to(y.dtype)), a=L(8, 4)), False),
    "integers normed again": (
        lambda: Trap(lambda m, y: m.a(F.layer_norm((4 * y).int().float(), (8,))), a=L(8, 4)),
        False,
    ),
    "a weight cast to integers": (
        lambda: Trap(lambda m, y: F.linear(y, (4 * m.a).to(torch.int32).to(y.dtype)), a=r(4, 8)),
        False,
    ),
    "a weight times a number": (lambda: Trap(lambda m, y: F.linear(y, m.a * 0.5, m.b), a=r(4, 8), b=r(4)), True),
    "a weight times a number, with a bias to fold": (
        lambda: Trap(lambda m, y: F.linear(y, m.a * 0.5, m.b), layer_norm(), a=r(4, 8), b=r(4)),
        False,
    ),
    "a bias times a number": (
        lambda: Trap(lambda m, y: F.linear(y, m.a, m.b * 0.5), layer_norm(), a=r(4, 8), b=r(4)),
        False,
    ),
    "a bias of one element": (
        lambda: Trap(lambda m, y: F.linear(y, m.a, m.b) * F.linear(y, m.c, m.e), a=r(4, 8), b=r(1), c=r(4, 8), e=r(1)),
        False,
    ),
    "a bias of one element, with a bias to fold": (
        lambda: Trap(lambda m, y: torch.addmm(m.b, y.reshape(-1, 8), m.a.t()), layer_norm(), a=r(4, 8), b=r(1)),
        False,
    ),
    "a weight that is its own bias": (lambda: Trap(lambda m, y: F.linear(y, m.a, m.a[0]), a=r(8, 8)), False),
    "a gain that is its own bias": (lambda: Trap(lambda m, y: m.a(y), OneForBoth(), a=L(8, 4)), False),
    "a weight that is a vector": (lambda: Trap(lambda m, y: F.linear(y, m.a), a=r(8)), False),
    "a vector behind a layer": (
        lambda: Trap(lambda m, y: torch.softmax(m.b(y) @ m.a, -1), a=r(4), b=L(8, 4, bias=False)),
        True,
    ),
    "a vector over tokens": (lambda: Trap(lambda m, y: m.a(m.b @ y), b=r(TOKENS), a=L(8, 4)), False),
    "a weight transposed into itself": (lambda: Trap(lambda m, y: y @ m.a.transpose(0, 0), a=r(8, 8)), True),
    "a transpose in the same storage": (transposed_in_storage, True),
    "a rounded gain": (lambda: Trap(lambda m, y: m.a(y), Gained(lambda w: (4 * w).round() / 4), a=L(8, 4)), False),
    "a gain that is rounded where it is tried": (
        lambda: Trap(lambda m, y: m.a(y), Gained(torch.round, size=6), a=L(6, 4)),
        False,
    ),
    "a gain that is clamped where it is not tried": (
        lambda: Trap(lambda m, y: m.a(y), Gained(lambda w: w.clamp(-10, 10), value=20.0), a=L(8, 4)),
        False,
    ),
    "a gain of whole numbers": (
        lambda: Trap(lambda m, y: m.a(y), Gained(lambda w: w.int().float(), value=2.0, size=6), a=L(6, 4)),
        False,
    ),
    "a gain that is read elsewhere": (lambda: Trap(lambda m, y: m.a(y) + m.norm.weight[:4], a=L(8, 4)), False),
    "a norm that is called twice": (
        lambda: Trap(lambda m, y: m.a(y) + m.b(m.norm(m.c(y))), a=L(8, 4), b=L(8, 4), c=L(8, 8)),
        True,
    ),
    "a norm of its own gain": (
        lambda: Trap(
            lambda m, y: m.a(F.rms_norm(m.g.expand(6, 8), (8,), m.g, 1e-5)) + m.b(y).abs(), g=r(8), a=L(8, 4), b=L(8, 4)
        ),
        True,
    ),
    "no tokens": (lambda: Trap(lambda m, y: m.a(torch.cat([y[:, :0], y], 1)), a=L(8, 4)), True),
    "an activation that is ReLU as far as one looks": (
        lambda: Trap(lambda m, y: m.a(ten(m.b(y)) * m.c(y)), a=L(4, 4), b=L(8, 4), c=L(8, 4)),
        True,
    ),
    "scores hidden by two masks": (lambda: Trap(twice_masked, a=L(8, 4)), False),
}


@pytest.mark.parametrize("name", TRAPS)
def test_falls_into_no_trap(name):
    make, folds = TRAPS[name]
    torch.manual_seed(0)
    judge = Judge(make(), {"x": torch.randn(2, TOKENS, WIDTH)})
    judge.check_all()
    judge.check_alone()
    sites = rewrites()["fold_norm"].find(judge.lifted, STOCK)
    assert any(site.refused is None for site in sites) == folds, sites


class Aliased(nn.Module):
    """A stream, a LayerNorm and a layer; `kept` is a module whose parameter is also that of one of them."""

    def __init__(self, tie: Callable[[Aliased], None]) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(9, WIDTH), nn.LayerNorm(WIDTH)
        self.layer, self.second = L(WIDTH, WIDTH), L(WIDTH, WIDTH)
        self.kept: nn.Module = L(WIDTH, WIDTH)
        self.calls_kept = False
        with torch.no_grad():
            for parameter in self.norm.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        tie(self)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        y = self.norm(self.table(ids))
        total = self.layer(y) + self.second(y)
        return {"logits": total + self.kept(y) if self.calls_kept else total}


def _same_weight(m: Aliased) -> None:
    m.kept.weight = m.layer.weight


def _same_gain(m: Aliased) -> None:
    m.kept = nn.LayerNorm(WIDTH)
    m.kept.weight = m.norm.weight


def _same_table(m: Aliased) -> None:
    m.kept = nn.Embedding(9, WIDTH)
    m.kept.weight = m.table.weight


def _same_module(m: Aliased) -> None:
    m.kept = m.layer


def _held_by_the_caller(m: Aliased) -> None:
    m.register_parameter("kept_bias", m.layer.bias)


def _read_under_both_names(m: Aliased) -> None:
    m.calls_kept = True
    m.kept.weight = m.layer.weight


UNREAD = {
    "a layer that is never called": (_same_weight, {"fold_norm", "merge_linears"}),
    "a norm that is never called": (_same_gain, {"fold_norm"}),
    "an embedding that is never called": (_same_table, {"center_norm_input"}),
    "the same module": (_same_module, set()),
    "a name that the caller holds": (_held_by_the_caller, set()),
    "both names are read": (_read_under_both_names, {"merge_linears"}),
}


@pytest.mark.parametrize("name", UNREAD)
def test_a_name_that_nothing_reads_counts_as_a_reader_that_is_not_known(name):
    tie, refusing = UNREAD[name]
    torch.manual_seed(0)
    judge = Judge(Aliased(tie), {"ids": torch.arange(8).view(2, 4)})
    judge.check_all()
    found = {n: rewrites()[n].find(judge.lifted) for n in ("fold_norm", "center_norm_input", "merge_linears")}
    assert {n for n, sites in found.items() if any(s.refused for s in sites)} == refusing, found
    unread = {n for n, sites in found.items() if any("also known as kept.weight" in (s.refused or "") for s in sites)}
    assert unread == (refusing if "never" in name else set()), found
