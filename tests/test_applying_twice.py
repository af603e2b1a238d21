"""Applying twice changes nothing: a plan for what a plan has made is empty."""

from __future__ import annotations

import architectures
import pytest
import scales
from torch import nn

from taut.plans import plan_and_apply

NOTHING = {("olmo2", "stock"), ("bert", "stock")}
"""Norms behind blocks, read by the residual or an output: none folds (tests/rewrites/test_fold_norm.py counts)."""


@pytest.mark.parametrize("form", ["stock", "taut"])
@pytest.mark.parametrize("name", scales.some([*architectures.NAMES, *scales.OTHERS]))
def test_a_second_plan_is_empty(name, form):
    plan, after = plan_and_apply(scales.traced(name)[1], form)
    assert bool(plan.applied) == ((name, form) not in NOTHING)
    again, _ = plan_and_apply(after, form)
    assert again.steps == ()


def test_layers_that_lose_their_bias_to_a_deferred_norm_are_merged_in_the_same_plan():
    """Before the norm is deferred one layer has a bias and the other has none, behind it neither has."""
    layers = {"norm": nn.RMSNorm(16), "a": nn.Linear(16, 4), "b": nn.Linear(16, 4, bias=False)}
    lifted = scales.hand_made(lambda m, x: m.a(m.norm(x)) + m.b(m.norm(x)).sigmoid(), **layers)[1]
    plan, _ = plan_and_apply(lifted, "taut")
    assert [step.rewrite for step in plan.steps] == ["fold_norm", "defer_norm", "merge_linears"]
    assert not [refusal for refusal in plan.refused if refusal.rewrite == "merge_linears"]
