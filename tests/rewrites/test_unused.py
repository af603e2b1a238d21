"""What a rewrite has left without a reader goes, once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from taut.lift import lift
from taut.plans import plan_and_apply
from taut.proof import prove
from taut.tracing import trace


class SharedGain(nn.Module):
    """Two norms of one gain, both behind a layer that can be centred."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.norm = nn.LayerNorm(8, bias=False)
        nn.init.normal_(self.norm.weight, 1.0, 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.second(self.norm(self.first(x)))))


class WrittenOut(nn.Module):
    """A LayerNorm by hand whose gain is cast, or stored less one, behind a layer that can be centred."""

    def __init__(self, less_one: bool) -> None:
        super().__init__()
        self.less_one = less_one
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.gain = nn.Parameter(1.0 + 0.3 * torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).to(torch.float32)
        centred = x - x.mean(-1, keepdim=True)
        normed = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5)
        gain = 1.0 + self.gain if self.less_one else self.gain.to(torch.float32)
        return self.head(gain * normed)


@pytest.mark.parametrize(
    ("model", "gain"), [(SharedGain(), "norm.weight"), (WrittenOut(False), "gain"), (WrittenOut(True), "gain")]
)
def test_a_folded_gain_is_dropped_once(model, gain):
    inputs = {"x": torch.randn(3, 8)}
    raw = trace(model.eval(), inputs)
    plan, after = plan_and_apply(lift(raw), "taut")
    assert {"fold_norm", "center_norm_input"} <= {step.rewrite for step in plan.steps}
    assert gain not in after.values
    assert prove(raw, after, [inputs]).passed
