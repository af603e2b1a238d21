"""center_reader: tied embeddings and norms behind a block, proof, a large mean, and every reason to refuse."""

import pytest
import scales
import torch
from scales import L, hand_made, traced
from torch import nn

from taut.ops.inv_std import inv_std
from taut.ops.layer_norm import layer_norm
from taut.proof import prove
from taut.rewrite import STOCK
from taut.rewrites.center_reader import center_reader
from taut.rewrites.fold_norm import fold_norm
from taut.values import Centred

W = scales.WIDTH
# By hand, two layers each: LayerNorms in all, and those in front of layers that take their gain and bias.
SITES = {"gpt2": (5, 4), "vit": (5, 4), "gpt_neox": (5, 4), "bert": (6, 0), "opt": (5, 4), "llama": (0, 0)}


@pytest.mark.parametrize("name", scales.some(SITES))
def test_sites_are_those_counted_by_hand_and_the_proof_passes(name):
    raw, lifted, inputs = traced(name)
    folded = fold_norm.apply(lifted)
    sites = center_reader.find(folded)
    assert (len(sites), sum(site.refused is None for site in sites)) == SITES[name]
    centred = center_reader.apply(folded)
    assert len(list(centred.calls(layer_norm))) == SITES[name][0] - SITES[name][1]
    assert len(list(centred.calls(inv_std))) == SITES[name][1]
    evidence = prove(raw, centred, [inputs])
    assert evidence.passed, evidence
    assert center_reader.find(folded, STOCK) == []


def bare(width: int = W) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-5, elementwise_affine=False)


BODIES = {
    "a bias, added behind the scalar": lambda m, x: m.a(m.n(x)),
    "behind a block": lambda m, x: m.a(m.n(x + m.b(x.relu()))),
    "two readers": lambda m, x: m.a(m.n(x)).sigmoid() + m.b(m.n(x)),
    "features in another order": lambda m, x: m.a(m.n(x).flip(-1)),
    "a ReLU behind it": lambda m, x: m.b(m.c(m.n(x)).relu()),
    "a padded convolution": lambda m, x: m.conv(m.n(x).mT).sigmoid(),
}


@pytest.mark.parametrize("case", BODIES)
def test_layers_that_read_a_norm(case):
    layers = {"a": L(W, W), "b": L(W, W, bias=False), "c": L(W, W, bias=False), "conv": nn.Conv1d(W, 8, 3, padding=1)}
    raw, graph, inputs = hand_made(BODIES[case], n=bare(), **layers)
    after = center_reader.apply(graph)
    sites = center_reader.find(graph)
    if case == "a padded convolution":
        assert "window over several tokens" in sites[0].refused
        return
    assert all(site.refused is None for site in sites)
    assert any(isinstance(value, Centred) for value in after.changed().values())
    evidence = prove(raw, after, [inputs])
    assert evidence.passed, evidence


@pytest.mark.parametrize("width", [16, 768, 2048])
def test_a_mean_a_thousand_times_the_deviation_costs_digits(width: int):
    """Roundings of the product's sum are a thousand times as large, and walk: 1e-4 is enough for 16 features only."""
    torch.manual_seed(0)
    _, graph, inputs = hand_made(lambda m, x: m.a(m.n(x)), width, n=bare(width), a=L(width, 16, bias=False))
    after = center_reader.apply(graph)
    x = {"x": inputs["x"] + 1e3}
    truth = graph.run(x, float64=True)["output"]
    error = (after.run(x)["output"] - truth).norm() / truth.norm()
    assert error <= 1e3 * torch.finfo(torch.float32).eps / 2 * width**0.5
    assert (error <= 1e-4) == (width == 16)


REFUSED = {
    "a gain": (lambda m, x: m.a(m.gained(x)), "fold_norm takes them"),
    "the residual": (lambda m, x: m.a(y := m.n(x)).sigmoid() + y, "read by add"),
    "an output": (lambda m, x: m.n(x), "output of the model"),
    "a weight that something else reads": (lambda m, x: m.a(m.n(x)).sigmoid() + m.a(x), "is also read by linear"),
    "a part of the features": (lambda m, x: m.part(m.n(x)[..., :8]), "does not sum over all"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_in_words(case):
    body, reason = REFUSED[case]
    layers = {"gained": nn.LayerNorm(W), "a": L(W, W), "part": L(8, W)}
    raw, graph, inputs = hand_made(body, n=bare(), **layers)
    (site,) = center_reader.find(graph)
    assert reason in site.refused
    assert prove(raw, center_reader.apply(graph), [inputs]).passed


def test_an_offset_of_all_features_changes_nothing():
    """The property itself: the rewritten layers do not see the mean."""
    _, graph, inputs = hand_made(lambda m, x: m.a(m.n(x)), n=bare(), a=L(W, W))
    after = center_reader.apply(graph)
    one = after.run(inputs, float64=True)["output"]
    two = after.run({"x": inputs["x"].double() + 3.0}, float64=True)["output"]
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
