"""What the proof does with outputs of few values and with models that cannot be proved."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from taut.lift import lift
from taut.plans import plan_and_apply
from taut.proof import ENOUGH, prove
from taut.tracing import CannotTrace, trace


class Classifier(nn.Module):
    """Two classes: an output of few values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.head = nn.RMSNorm(32), nn.Linear(32, 2)
        nn.init.normal_(self.norm.weight, 1.0, 0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(x))


class Noisy(Classifier):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + torch.randn_like(x))


class Deep(nn.Module):
    """Deeper than Python's recursion, without a norm in front of most layers."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        for layer in self.layers:
            x = torch.tanh(layer(x)) + 1
        return x


def test_errors_of_few_values_are_pooled_over_spare_inputs():
    raw = trace(Classifier().eval(), {"x": torch.randn(2, 32)})
    _, after = plan_and_apply(lift(raw), "stock")
    taken = []

    def spare():
        for seed in range(1000):
            taken.append(seed)
            yield {"x": torch.randn(2, 32, generator=torch.Generator().manual_seed(seed))}

    evidence = prove(raw, after, [{"x": torch.randn(2, 32)}], spare=spare())
    assert evidence.passed
    assert ENOUGH / 4 <= len(taken) + 1 <= ENOUGH / 4 + 1


def test_a_wrong_value_fails_however_many_inputs_are_pooled():
    raw = trace(Classifier().eval(), {"x": torch.randn(2, 32)})
    _, after = plan_and_apply(lift(raw), "stock")
    inputs = [{"x": torch.randn(2, 32)} for _ in range(40)]
    broken = {name: after.evaluate(name, None) for name in after.changed()}
    broken["head.weight"] = broken["head.weight"] * 1.01
    evidence = prove(raw, after, inputs, written=broken)
    assert not evidence.passed
    assert evidence.wrong_tensors == ["head.weight"]
    assert evidence.error_ratio > 2


def test_a_model_that_draws_random_numbers_is_refused_with_the_reason():
    with pytest.raises(CannotTrace, match="draws random numbers"):
        trace(Noisy().eval(), {"x": torch.randn(2, 32)})


def test_depth_is_no_recursion():
    graph = lift(trace(Deep(1200).eval(), {"x": torch.randn(2, 4)}))
    plan, _ = plan_and_apply(graph, "stock", ["fold_norm"])
    assert plan.applied == 1
