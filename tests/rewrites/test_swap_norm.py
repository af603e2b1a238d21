"""swap_norm: what the emulated norms cost the demo models, in perplexity, divergence and noise."""

import functools

import pytest
import torch
from scales import Body, hand_made
from torch import nn
from twice import as_accurate

from taut.demonstrate import DEMO
from taut.lift import lift
from taut.module import GraphModule
from taut.nn.norm.guaranteed_layer_norm import GuaranteedLayerNorm
from taut.nn.norm.iter_l2_norm import IterL2Norm
from taut.nn.norm.mx import MXNorm
from taut.nn.norm.rms_norm import RMSNorm
from taut.ops.rms_norm import rms_norm
from taut.quality import compare
from taut.rewrites.swap_norm import swap_norm, swapping
from taut.tracing import trace


@functools.cache
def demo(name: str):
    """A demo model, 256 tokens of its held-out text, and its graph."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO / name)
    ids = tokenizer((DEMO / "heldout.txt").read_text()[:2000], return_tensors="pt").input_ids[:, :256]
    model = AutoModelForCausalLM.from_pretrained(DEMO / name, dtype=torch.float32).eval()
    return model, [ids], lift(trace(model, {"input_ids": ids}))


def quality(name: str, factory):
    """What swapping costs a demo model; its graph is traced once for all factories."""
    model, batches, graph = demo(name)
    return compare(model, GraphModule(swapping(factory).apply(graph)), batches)


def test_an_exact_norm_costs_nothing():
    model, batches, _ = demo("model")
    swapped = swap_norm(model, lambda kind, d, eps: RMSNorm(d, eps, gain="none"))
    assert len(swapped.norms) == 13
    found = compare(model, swapped, batches)
    assert found.perplexity_ratio == pytest.approx(1, abs=1e-5)
    assert found.agreement == 1
    assert found.sqnr > 100


def test_the_better_estimate_costs_less():
    """MXFP8 with the exact mean square, MXFP8 with the estimate from its blocks, and the mean square of 1/16."""
    factories = [
        lambda kind, d, eps: MXNorm(d, eps, estimate="exact"),
        lambda kind, d, eps: MXNorm(d, eps),
        lambda kind, d, eps: RMSNorm(d, eps, gain="none", partial=0.0625),
    ]
    found = [quality("model", factory) for factory in factories]
    assert [q.kl for q in found] == sorted(q.kl for q in found)
    assert [q.sqnr for q in found] == sorted((q.sqnr for q in found), reverse=True)
    assert [q.perplexity_after for q in found] == sorted(q.perplexity_after for q in found)
    assert found[0].perplexity_ratio < 1.1 < found[2].perplexity_ratio
    assert {q.tokens for q in found} == {255}


def test_layer_norm_units():
    """IterL2Norm after five steps is LayerNorm, after two it is not; the 8-bit guaranteed unit is in between."""
    kinds = []

    def iterated(steps):
        def make(kind, d, eps):
            kinds.append(kind)
            return IterL2Norm(d, eps, steps=steps)

        return make

    five, two = (quality("layernorm", iterated(steps)) for steps in (5, 2))
    fixed = quality("layernorm", lambda kind, d, eps: GuaranteedLayerNorm(d))
    assert set(kinds) == {"layer_norm"}
    assert abs(five.perplexity_ratio - 1) <= 1e-3 < abs(two.perplexity_ratio - 1)
    assert five.kl < fixed.kl < two.kl


def test_only_the_norms_that_the_factory_answers_are_swapped():
    body = lambda m, x: m.b(m.a(x))  # noqa: E731
    _, lifted, inputs = hand_made(body, a=nn.LayerNorm(16), b=nn.RMSNorm(16))
    rewrite = swapping(lambda kind, d, eps: RMSNorm(d, eps, gain="none") if kind == "rms_norm" else None)
    assert [site.refused for site in rewrite.find(lifted)] == ["no other norm was given for a layer_norm", None]
    before, after = (graph.run(inputs)["output"] for graph in (lifted, rewrite.apply(lifted)))
    assert as_accurate(after, before, lifted.run(inputs, float64=True)["output"])
    assert len(list(rewrite.apply(lifted).calls(rms_norm))) == 0


def test_gain_and_bias_stay_the_models_own():
    model = Body(lambda m, x: m.a(x), a=nn.LayerNorm(16))
    x = torch.randn(3, 5, 16)
    swapped = swap_norm(model, lambda kind, d, eps: nn.LayerNorm(d, eps, elementwise_affine=False), {"x": x[:2]})
    assert as_accurate(swapped(x=x)["output"], model(x), model.double()(x.double()))


def test_refuses_what_would_change_nothing():
    with pytest.raises(ValueError, match="no norm of this model was swapped"):
        swap_norm(Body(lambda m, x: x * 2), lambda kind, d, eps: None, {"x": torch.ones(2, 3, 16)})
