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
from taut.nn.emulate.softmax import GuaranteedSoftmax
from taut.nn.norm.guaranteed_layer_norm import GuaranteedLayerNorm
from taut.nn.norm.iter_l2_norm import IterL2Norm
from taut.nn.norm.light_norm import LightNorm2d, RangeBatchNorm2d
from taut.nn.norm.mx import MXNorm
from taut.nn.norm.rms_norm import RMSNorm
from taut.ops.attention import attention
from taut.ops.layer_norm import layer_norm
from taut.ops.rms_norm import rms_norm
from taut.quality import compare
from taut.rewrites.swap_norm import SwappedSoftmax, swap_norm, swapping
from taut.tracing import trace


@functools.cache
def demo(name: str):
    """A demo model, 256 tokens of its held-out text, and its graph."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO / name)
    ids = tokenizer((DEMO / "heldout.txt").read_text()[:2000], return_tensors="pt").input_ids[:, :256]
    model = AutoModelForCausalLM.from_pretrained(DEMO / name, dtype=torch.float32).eval()
    return model, [ids], lift(trace(model, {"input_ids": ids}))


def quality(name: str, *swapped):
    """What swapping costs a demo model; its graph is traced once for all."""
    model, batches, graph = demo(name)
    return compare(model, GraphModule(swapping(*swapped).apply(graph)), batches)


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


def test_a_softmax_unit():
    """The better its bits the less it costs, and what a sum that drifts costs is more than all of them."""
    exact, wide, narrow, drifting = (
        quality("model", None, unit)
        for unit in (nn.Softmax(-1), GuaranteedSoftmax(16), GuaranteedSoftmax(8), GuaranteedSoftmax(8, guarantee=False))
    )
    assert exact.agreement == 1
    assert exact.kl < wide.kl < narrow.kl < drifting.kl
    assert abs(wide.perplexity_ratio - 1) <= 5e-3 < abs(drifting.perplexity_ratio - 1)


def test_a_softmax_unit_sees_masks_windows_and_positions():
    """Every score that attention hides is -inf to the unit, and softcap and slopes are in."""
    shared = {"mask": torch.rand(2, 6, 5, 9) > 0.3, "softcap": 2.0, "window": 4, "alibi": torch.rand(6), "causal": True}
    q, k, v = torch.randn(2, 6, 5, 16), torch.randn(2, 3, 9, 16), torch.randn(2, 3, 9, 24)
    swapped = SwappedSoftmax(nn.Softmax(-1))
    wide = shared | {"alibi": shared["alibi"].double()}
    truth = attention.reference(q.double(), k.double(), v.double(), **wide)
    assert as_accurate(swapped(q, k, v, **shared), attention.reference(q, k, v, **shared), truth)


def test_a_sink_keeps_its_softmax():
    sinks = torch.randn(6)
    _, graph, _ = hand_made(lambda m, x: m.a(x), a=nn.LayerNorm(16))
    (norm,) = graph.calls(layer_norm)
    x = norm.args[0]
    with graph.fx.inserting_before(norm):
        node = graph.fx.call_function(attention, (x, x, x), {"sinks": sinks})
    node.meta = {"where": "attention"}
    sites = swapping(None, GuaranteedSoftmax()).find(graph)
    assert [site.refused for site in sites] == ["a sink takes part in its softmax"]


def test_batch_norms_take_the_models_statistics_gain_and_bias():
    """The range norm's evaluation is a batch norm's; LightNorm's rounding is what it costs."""
    from transformers import ResNetForImageClassification

    from taut.shrink import example_inputs, tiny_model

    model = tiny_model(ResNetForImageClassification)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    inputs = example_inputs(model)
    exact, light = (swap_norm(model, batch_norm=kind) for kind in (RangeBatchNorm2d, LightNorm2d))
    assert len(exact.norms) == len(light.norms) == 29
    plain, got, rounded = (m(**inputs)["logits"].detach() for m in (model, exact, light))
    truth = model.double()(**{name: x.double() for name, x in inputs.items()}).logits.detach()
    assert as_accurate(got, plain, truth)
    assert 1e-3 < (rounded - truth).norm() / truth.norm() < 0.3


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
