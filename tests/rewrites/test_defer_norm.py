"""defer_norm: hand-counted sites on fourteen architectures, proof, and where the scalar lands."""

import pytest
import scales
import torch
import torch.nn.functional as F
from scales import L, hand_made
from torch import nn

from taut.facts.degree import NORMS
from taut.lift import lift
from taut.ops.inv_rms import inv_rms
from taut.ops.layer_norm import layer_norm
from taut.ops.linear import linear
from taut.proof import prove
from taut.rewrite import STOCK, rewrites
from taut.rewrites.cancel_norm import cancel_norm
from taut.rewrites.defer_norm import defer_norm
from taut.rewrites.fold_norm import fold_norm
from taut.tracing import trace

aten = torch.ops.aten
W = scales.WIDTH

# Counted by hand from the modeling code, two layers each, logits promised: norms in all, deferred as they stand, and
# deferred once gains and biases are folded.
SITES = {
    "llama": (5, 5, 5),
    "gemma": (5, 5, 5),
    "gemma2": (9, 5, 5),  # post-norms are read by the residual
    "gemma4": (15, 3, 3),  # q, k, v and post-norms; the norms in front of q, k, v cancel
    "qwen3": (9, 5, 5),  # attention reads the q and k norms
    "olmo2": (9, 1, 1),
    "mixtral": (5, 3, 3),  # experts pick their tokens before any product
    "deepseek_v3": (9, 8, 8),  # the second layer has experts
    "gpt_neox": (5, 0, 4),  # biases; the final norm's cannot be folded
    "gpt2": (5, 0, 4),
    "opt": (5, 0, 4),
    "bert": (6, 0, 1),  # residual readers, all but the last; the head's norm has a tied decoder
    "t5": (12, 12, 12),
    "vit": (5, 0, 5),
}


def applicable(graph):
    return [site for site in defer_norm.find(graph) if site.refused is None]


def calls(graph, *targets):
    return len(list(graph.calls(*targets)))


@pytest.mark.parametrize("name", scales.some(SITES))
def test_sites_are_those_counted_by_hand_and_the_proof_passes(name):
    raw, graph, inputs = scales.traced(name, "logits")
    folded = fold_norm.apply(graph)
    counts = len(defer_norm.find(graph)), len(applicable(graph)), len(applicable(folded))
    assert counts == SITES[name]
    assert all(site.refused != "" for site in defer_norm.find(graph))
    deferred = defer_norm.apply(folded)
    assert calls(deferred, inv_rms) == SITES[name][2]
    assert not applicable(deferred)
    evidence = prove(raw, deferred, [inputs])
    assert evidence.passed, evidence


@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek_v3"])
def test_gains_may_stay(name):
    raw, graph, inputs = scales.traced(name, "logits")
    deferred = defer_norm.apply(graph)
    assert prove(raw, deferred, [inputs]).passed
    left = [site for site in fold_norm.find(deferred) if site.refused is None]
    assert len(left) <= SITES[name][0] - SITES[name][1]
    assert prove(raw, fold_norm.apply(deferred), [inputs]).passed


def test_the_hidden_state_refuses_when_it_is_promised():
    _, graph, _ = scales.traced("llama", "all")
    refused = {site.where: site.refused for site in defer_norm.find(graph) if site.refused}
    assert list(refused) == ["model.norm"]
    assert "output" in refused["model.norm"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_proof_fails_when_any_scalar_is_left_out(name):
    raw, graph, inputs = scales.traced(name, "logits")
    deferred = defer_norm.apply(fold_norm.apply(graph))
    assert calls(deferred, aten.mul.Tensor) > calls(graph, aten.mul.Tensor)
    put_in = [n.name for n in deferred.calls(aten.mul.Tensor) if n.name not in {m.name for m in graph.nodes}]
    for name_of_one in put_in:
        broken = deferred.copy()
        one = next(n for n in broken.nodes if n.name == name_of_one)
        one.replace_all_uses_with(one.args[0])
        assert not prove(raw, broken, [inputs]).passed, name_of_one


def test_the_proof_fails_when_a_bias_is_divided_along_with_the_product():
    """(x W + c) s in place of (x W) s + c, as a published implementation has it."""
    layers = {"n": norm(), "biased": L(W, W)}
    raw, graph, inputs = hand_made(lambda m, x: m.biased(m.n(x)), **layers)
    deferred = defer_norm.apply(graph)
    assert prove(raw, deferred, [inputs]).passed
    (scaled,) = (n for n in deferred.calls(aten.mul.Tensor) if n.args[0].target is linear)
    (added,) = scaled.users
    assert added.target is aten.add.Tensor
    product, scalar = scaled.args
    scaled.args, added.args = (added, scalar), (product, added.args[1])
    added.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
    scaled.prepend(added)
    evidence = prove(raw, deferred, [inputs])
    assert not evidence.passed
    assert evidence.float64_error > 1e-3


def norm():
    return nn.RMSNorm(W, eps=1e-5, elementwise_affine=False)


def centred_norm():
    return nn.LayerNorm(W, eps=1e-5, bias=False)


def plain(*sizes):
    return L(*sizes, bias=False)


# What reads the norm y, how many products are multiplied by the scalar, and to which power.
PLACES = {
    "ReLU: the narrow product behind": (lambda m, x, y: x + m.b(m.a(y).relu()), 1, 1),
    "squared ReLU": (lambda m, x, y: x + m.b(m.a(y).relu().square()), 1, 2),
    "GLU: the gate, and the narrow product": (lambda m, x, y: x + m.b(F.silu(m.a(y)) * m.c(y)), 2, 1),
    "ReLU GLU": (lambda m, x, y: x + m.b(m.a(y).relu() * m.c(y)), 1, 2),
    "a bias is added behind it": (lambda m, x, y: x + m.d(m.biased(y).relu()), 1, 1),
    "before heads are repeated": (lambda m, x, y: m.d(y).unsqueeze(1).expand(2, 4, 6, W).softmax(-1), 1, 1),
    "two layers read by one sum": (lambda m, x, y: x + m.b(m.a(y) + m.c(y)), 1, 1),
}


@pytest.mark.parametrize("case", PLACES)
@pytest.mark.parametrize("layer", [norm, centred_norm])
def test_the_scalar_is_put_in_where_it_multiplies_least(case, layer):
    body, products, power = PLACES[case]
    layers = {"a": plain(W, 4 * W), "c": plain(W, 4 * W), "b": plain(4 * W, W), "d": plain(W, W), "biased": L(W, W)}
    raw, graph, inputs = hand_made(lambda m, x: body(m, x, m.n(x)), n=layer(), **layers)
    deferred = defer_norm.apply(graph)
    evidence = prove(raw, deferred, [inputs])
    assert evidence.passed, evidence
    old = {node.name for node in graph.nodes}
    scaled = [n for n in deferred.calls(aten.mul.Tensor) if n.name not in old and n.args[0].target is linear]
    assert len(scaled) == products
    assert all(torch.Size(n.meta["val"].shape) != (2, 6, 4 * W) for n in scaled) or "gate" in case
    assert [n.args[1] for n in deferred.calls(aten.pow.Tensor_Scalar) if n.name not in old] == [power] * (power > 1)


def test_a_norm_behind_it_takes_the_scalar_into_its_epsilon():
    def body(m, x):
        y = m.n(x)
        return x + m.after(m.b(F.silu(m.a(y)) * m.c(y)))

    layers = {"a": plain(W, 32), "c": plain(W, 32), "b": plain(32, W)}
    for after in (nn.RMSNorm(W, eps=0.1), nn.LayerNorm(W, eps=0.1)):
        raw, graph, inputs = hand_made(body, n=nn.RMSNorm(W, eps=0.1), after=after, **layers)
        deferred = defer_norm.apply(graph, ["n"])
        assert isinstance(next(deferred.calls(*NORMS)).args[-1], torch.fx.Node)
        evidence = prove(raw, deferred, [inputs])
        assert evidence.passed, evidence


REFUSED = {
    "a bias": (lambda m, y: m.a(y), nn.LayerNorm(W), "fold its bias first"),
    "read by a residual": (lambda m, y: m.a(y).sigmoid() + y, nn.RMSNorm(W), "add"),
    "read by an activation": (lambda m, y: m.a(y.sigmoid()), nn.RMSNorm(W), "sigmoid"),
    "all of it cancels": (lambda m, y: m.second(m.a(y)), nn.RMSNorm(W), "cancel_norm"),
    "only its order is read": (lambda m, y: m.b.weight[y.argmax(-1)], nn.RMSNorm(W), "nothing behind it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_in_words(case):
    body, layer, reason = REFUSED[case]
    layers = {"a": plain(W, W), "b": plain(W, W), "second": nn.RMSNorm(W)}
    _, graph, _ = hand_made(lambda m, x: body(m, m.n(x)), n=layer, **layers)
    assert reason in defer_norm.find(graph)[0].refused
    assert defer_norm.find(graph, STOCK) == []


def test_refuses_float16():
    model = scales.Body(lambda m, x: m.a(m.n(x)), n=nn.RMSNorm(W), a=plain(W, W)).half()
    (site,) = defer_norm.find(lift(trace(model, {"x": torch.ones(2, 3, W).half()})))
    assert "float16" in site.refused


def test_in_bfloat16_it_is_at_most_twice_as_far_from_the_truth():
    model = scales.architectures.build("gpt2", torch.bfloat16)
    inputs = scales.architectures.inputs(model)
    raw = trace(model, inputs, outputs="logits")
    evidence = prove(raw, defer_norm.apply(fold_norm.apply(lift(raw))), [inputs])
    assert evidence.passed, evidence


def test_nothing_depends_on_the_sizes_of_the_trace():
    """Traced with symbolic batch and length, run at others."""

    def body(m, x):
        y = m.n(x)
        heads = m.a(y).view(*x.shape[:2], 4, 4).transpose(1, 2)
        flat = m.a(y.reshape(-1, W)).relu().view(x.shape)
        return m.b(heads.transpose(1, 2).flatten(2) + flat) + x, heads.softmax(-1)

    model = scales.Body(body, n=nn.RMSNorm(W, eps=1e-3), a=plain(W, W), b=plain(W, W)).eval()
    graph = lift(trace(model, {"x": torch.ones(2, 6, W)}, symbolic=True))
    deferred = defer_norm.apply(graph)
    assert calls(deferred, inv_rms, layer_norm) == 1
    x = torch.randn(3, 11, W)
    before, after = graph.run({"x": x}, float64=True), deferred.run({"x": x}, float64=True)
    for name, value in before.items():
        assert (after[name] - value).abs().max() <= 1e-12 * value.abs().max()


def test_a_step_that_does_not_fit_says_so():
    _, graph, _ = scales.traced("qwen3", "logits")
    with pytest.raises(ValueError, match="refuses"):
        defer_norm.apply(graph, ["model.layers.0.self_attn.q_norm"])


def test_found_by_listing_the_folder_and_tried_after_folding_and_cancelling():
    names = list(rewrites())
    assert names.index("fold_norm") < names.index("cancel_norm") < names.index("defer_norm")
    assert rewrites()["cancel_norm"] is cancel_norm
