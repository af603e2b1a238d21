"""What a rewrite has left without a reader goes, once."""

from __future__ import annotations

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


def test_a_gain_that_two_norms_share_is_dropped_once():
    inputs = {"x": torch.randn(3, 8)}
    raw = trace(SharedGain().eval(), inputs)
    plan, after = plan_and_apply(lift(raw), "taut")
    assert {"fold_norm", "center_norm_input"} <= {step.rewrite for step in plan.steps}
    assert "norm.weight" not in after.values
    assert prove(raw, after, [inputs]).passed
