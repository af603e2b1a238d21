"""drop_final_scale_for_argmax: the largest logit stays, and whoever asks for more is refused."""

import pytest
import scales
import torch
from torch import nn

from taut.facts.degree import NORMS
from taut.lift import lift
from taut.proof import prove
from taut.rewrite import TAUT
from taut.rewrites.drop_final_scale_for_argmax import drop_final_scale_for_argmax as drop
from taut.rewrites.fold_norm import fold_norm
from taut.tracing import trace

W = scales.WIDTH

# By hand: the head has no bias and no softcap, and the final norm no bias that stays.
APPLIES = {
    "llama": "model.norm",
    "olmo2": "model.norm",
    "deepseek_v3": "model.norm",
    "t5": "decoder.final_layer_norm",
    "gemma": "model.norm",
    "gemma2": None,  # softcap
    "gpt2": None,  # a bias that the head cannot take
    "bert": None,  # a head bias
}


@pytest.mark.parametrize("name", scales.some(APPLIES))
def test_applies_to_the_final_norm_alone(name):
    raw, graph, inputs = scales.traced(name, "logits")
    graph = fold_norm.apply(graph)
    sites = drop.find(graph)
    assert len(sites) == len(list(graph.calls(*NORMS)))
    assert [site.where for site in sites if not site.refused] == [w for w in [APPLIES[name]] if w]
    if APPLIES[name] is None:
        return
    dropped = drop.apply(graph)
    assert len(list(dropped.calls(*NORMS))) == len(sites) - 1
    assert not [site for site in drop.find(dropped) if not site.refused]
    evidence = prove(raw, dropped, [inputs], promises={"logits": "argmax"})
    assert evidence.passed, evidence
    assert prove(raw, dropped, [inputs]).float64_error > 1e-3


def test_the_values_of_other_outputs_must_not_be_promised():
    _, graph, _ = scales.traced("llama", "all")
    reasons = {site.where: site.refused for site in drop.find(graph)}
    assert "last_hidden_state" in reasons["model.norm"]


class Head(nn.Module):
    def __init__(self, body):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.head, self.biased = nn.RMSNorm(W), nn.Linear(W, 9, bias=False), nn.Linear(W, 9)
        self.body = body

    def forward(self, x):
        return self.body(self, self.norm(x))


CASES = {
    "plain": (lambda m, y: {"logits": m.head(y)}, None),
    "scaled, and the last token alone": (lambda m, y: {"logits": m.head(y[:, -1:]) / 3}, None),
    "a head bias": (lambda m, y: {"logits": m.biased(y)}, "adds a bias"),
    "a softcap": (lambda m, y: {"logits": 30 * torch.tanh(m.head(y) / 30)}, "tanh"),
    "another output": (lambda m, y: {"logits": m.head(y), "hidden": y}, "hidden"),
    "no logits": (lambda m, y: {"scores": m.head(y)}, "scores"),
    "of several tokens": (lambda m, y: {"logits": m.head(y)[..., 0]}, "different scales"),
    "a reciprocal": (lambda m, y: {"logits": m.head(y).reciprocal()}, "different scales"),
    "read by another norm": (lambda m, y: {"logits": m.head(m.norm(m.head(y) @ m.head.weight))}, "another norm"),
}


@pytest.mark.parametrize("case", CASES)
def test_refuses_whatever_reads_more_than_the_order(case):
    body, reason = CASES[case]
    graph = lift(trace(Head(body).eval(), {"x": torch.randn(2, 5, W)}))
    site = drop.find(graph)[0]
    assert (site.refused is None) == (reason is None)
    assert reason is None or reason in site.refused


def test_must_be_asked_for_and_promises_argmax_alone():
    assert drop.asked
    assert drop.promises == "argmax"
    assert drop.forms == (TAUT,)
