"""cancel_norm: exact with epsilon, as good as predicted without, refused wherever one path is not normalised."""

import pytest
import scales
import torch.nn.functional as F
from scales import L, hand_made
from torch import nn

from taut.facts.degree import NORMS
from taut.proof import prove
from taut.rewrite import Exactness
from taut.rewrites.cancel_norm import cancel_norm, cancel_norm_plain, plain_error
from taut.rewrites.defer_norm import defer_norm
from taut.rewrites.fold_norm import fold_norm

W = scales.WIDTH


def applicable(graph, rewrite=cancel_norm):
    return [site.where for site in rewrite.find(graph) if site.refused is None]


def plain(*sizes):
    return L(*sizes, bias=False)


@pytest.mark.parametrize("name", scales.some(("llama", "qwen3", "olmo2", "gemma2", "deepseek_v3", "mixtral")))
def test_refuses_where_a_path_is_not_normalised_again(name):
    """Norms on queries and keys alone, the rotary slice beside a normalised latent, sandwich norms around a gate."""
    _, graph, _ = scales.traced(name, "logits")
    sites = cancel_norm.find(graph)
    assert len(sites) == len(list(graph.calls(*NORMS)))
    assert all(site.refused for site in sites)
    if name == "deepseek_v3":
        latent = next(site for site in sites if site.where == "model.layers.0.input_layernorm")
        assert "not every path" in latent.refused


@pytest.mark.parametrize("first", [[], [fold_norm], [defer_norm]])
def test_gemma_4_needs_no_norm_in_front_of_normalised_queries_keys_and_values(first):
    raw, graph, inputs = scales.traced("gemma4", "logits")
    for rewrite in first:
        graph = rewrite.apply(graph)
    assert applicable(graph) == ["model.layers.0.input_layernorm", "model.layers.1.input_layernorm"]
    cancelled = cancel_norm.apply(graph)
    assert not applicable(cancelled)
    evidence = prove(raw, cancelled, [inputs])
    assert evidence.passed, evidence
    assert prove(raw, fold_norm.apply(cancelled), [inputs]).passed


class Attention(nn.Module):
    """A norm in front of q, k and v, each with a norm per head or without."""

    def __init__(self, normed="qkv"):
        super().__init__()
        self.norm = nn.RMSNorm(W, eps=0.05)
        self.layers = nn.ModuleDict({n: plain(W, W) for n in "qkv"})
        self.norms = nn.ModuleDict({n: nn.RMSNorm(4, eps=0.02) for n in normed})

    def head(self, y, n):
        h = self.layers[n](y).view(*y.shape[:2], 4, 4)
        return (self.norms[n](h) if n in self.norms else h).transpose(1, 2)

    def forward(self, m, x):
        y = self.norm(x)
        return x + F.scaled_dot_product_attention(*(self.head(y, n) for n in "qkv")).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("normed", "legal"), [("qkv", True), ("qk", False), ("q", False), ("v", False)])
def test_queries_keys_and_values_must_all_be_normalised(normed, legal):
    attention = Attention(normed)
    raw, graph, inputs = hand_made(lambda m, x: m.attention(m, x), attention=attention)
    assert applicable(graph) == (["attention.norm"] if legal else [])
    assert prove(raw, defer_norm.apply(cancel_norm.apply(graph)), [inputs]).passed


LEGAL = {
    "norm, linear, norm": lambda m, x: m.second(m.b(m.a(m.first(x)))),
    "ReLU between": lambda m, x: m.second(m.b(m.a(m.first(x)).relu())),
    "squared ReLU between": lambda m, x: m.second(m.b(m.a(m.first(x)).relu().square())),
    "a double norm, as in BitLinear": lambda m, x: m.b(m.a(m.second(m.first(x)))),
}


@pytest.mark.parametrize("case", LEGAL)
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (nn.RMSNorm(W, eps=0.3), nn.RMSNorm(W, eps=0.2)),
        (nn.LayerNorm(W, eps=0.3, bias=False), nn.RMSNorm(W, eps=0.2)),
        (nn.RMSNorm(W, eps=0.3), nn.LayerNorm(W, eps=0.2)),
    ],
)
def test_exact_with_large_epsilons(case, first, second):
    raw, graph, inputs = hand_made(LEGAL[case], first=first, second=second, a=plain(W, 32), b=plain(32, W))
    cancelled = cancel_norm.apply(graph, ["first"])
    assert len(list(cancelled.calls(*NORMS))) == 1
    evidence = prove(raw, cancelled, [inputs])
    assert evidence.passed, evidence
    assert prove(raw, fold_norm.apply(cancelled), [inputs]).passed
    assert prove(raw, cancel_norm.apply(fold_norm.apply(graph)), [inputs]).passed
    wrong = prove(raw, cancel_norm_plain.apply(graph, ["first"]), [inputs])
    assert wrong.float64_error > 1e-3


def test_a_chain_of_norms_cancels_down_to_the_last():
    layers = {n: nn.RMSNorm(W, eps=0.1 * (i + 1)) for i, n in enumerate(("n0", "n1", "n2"))}
    layers |= {n: plain(W, W) for n in ("a", "b")}
    raw, graph, inputs = hand_made(lambda m, x: m.n2(m.b(m.n1(m.a(m.n0(x))))), **layers)
    assert applicable(graph) == ["n0", "n1"]
    cancelled = cancel_norm.apply(graph)
    assert [n.meta["where"] for n in cancelled.calls(*NORMS)] == ["n2"]
    assert prove(raw, cancelled, [inputs]).passed
    one_by_one = cancel_norm.apply(cancel_norm.apply(graph, ["n0"]), ["n1"])
    assert prove(raw, one_by_one, [inputs]).passed


def test_plain_error_is_the_error_of_the_plain_form():
    assert cancel_norm_plain.exactness is Exactness.BOUNDED
    assert cancel_norm_plain.asked
    for second, power in ((nn.RMSNorm(W, eps=0.2), 1), (nn.LayerNorm(W, eps=0.2, bias=False), 2)):
        layers = {"first": nn.RMSNorm(W, eps=0.3), "second": second, "a": plain(W, W)}
        raw, graph, inputs = hand_made(lambda m, x, p=power: m.second(m.a(m.first(x)).relu().pow(p)), **layers)
        predicted = plain_error(graph, "first", [inputs])
        true = raw.run(inputs, float64=True)["output"]
        got = cancel_norm_plain.apply(graph, ["first"]).run(inputs, float64=True)["output"]
        here = true != 0
        measured = (1 - true[here] / got[here]).abs().max().item()
        assert list(predicted) == ["second"]
        assert measured > 1e-3
        assert abs(predicted["second"] - measured) < 1e-9


@pytest.mark.parametrize("mean_square", [1e-8, 1e-4, 1.0, 1e4, 1e8])
def test_inputs_of_any_size(mean_square: float):
    """With epsilon carried along nothing is lost at any size; the plain form loses what is predicted, and where the
    inputs are small that is a half."""
    layers = {"first": nn.RMSNorm(W, eps=1e-6), "second": nn.RMSNorm(W, eps=1e-5), "a": plain(W, W)}
    _, graph, inputs = hand_made(lambda m, x: m.second(m.a(m.first(x))), **layers)
    x = inputs["x"].double()
    inputs = {"x": x * (mean_square / x.square().mean(-1, keepdim=True)).sqrt()}
    true = graph.run(inputs, float64=True)["output"]
    exact, bare = (rewrite.apply(graph, ["first"]) for rewrite in (cancel_norm, cancel_norm_plain))
    assert (exact.run(inputs, float64=True)["output"] - true).norm() <= 1e-12 * true.norm()
    measured = (1 - true / bare.run(inputs, float64=True)["output"]).abs().max().item()
    predicted = plain_error(graph, "first", [inputs])["second"]
    assert predicted / 2 <= measured + 1e-12 <= 2 * predicted + 2e-12
    assert (measured > 0.5) == (mean_square < 1e-6)


REFUSED = {
    "a bias in between": (lambda m, y: m.second(m.biased(y)), "adds a bias"),
    "a residual": (lambda m, y: m.second(m.a(y)) + y, "does not scale"),
    "a gate": (lambda m, y: m.second(F.silu(m.a(y)) * m.a(y)), "silu"),
    "an output": (lambda m, y: (m.second(m.a(y)), m.a(y)), "output"),
    "ReLU into the residual": (lambda m, y: m.a(y).relu() + m.a.weight[0], "does not scale"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_in_words(case):
    body, reason = REFUSED[case]
    layers = {"first": nn.RMSNorm(W), "second": nn.RMSNorm(W), "a": plain(W, W), "biased": L(W, W)}
    _, graph, _ = hand_made(lambda m, x: body(m, m.first(x)), **layers)
    site = cancel_norm.find(graph)[0]
    assert site.where == "first"
    assert reason in site.refused


def test_a_norm_with_a_bias_must_be_folded_first():
    layers = {"first": nn.LayerNorm(W), "second": nn.RMSNorm(W), "a": L(W, W)}
    _, graph, _ = hand_made(lambda m, x: m.second(m.a(m.first(x))), **layers)
    assert "fold its bias first" in cancel_norm.find(graph)[0].refused
