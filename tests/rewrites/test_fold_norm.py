"""fold_norm: hand-counted sites on fifteen architectures, proof, and an outside witness."""

import architectures
import independent
import pytest
import torch
from torch import nn

import taut
from taut.lift import lift
from taut.rewrite import STOCK, TAUT, rewrites
from taut.rewrites.fold_norm import fold_norm
from taut.tracing import trace

# Counted by hand from the modeling code, two layers each: norms in all, and folded with all outputs, with logits only.
SITES = {
    "llama": (5, 4, 5),
    "qwen2": (5, 4, 5),
    "qwen3": (9, 4, 5),  # q and k norms are read by RoPE
    "gemma2": (9, 4, 4),  # post-norms are read by the residual; the head is tied
    "olmo2": (9, 0, 1),  # post-norms and q/k norms only; the final norm is the base model's output
    "mixtral": (5, 4, 5),
    "deepseek_v3": (9, 8, 9),
    "gpt_neox": (5, 4, 4),  # the final norm has a bias, the head has none
    "gpt2": (5, 4, 4),
    "gpt2_untied": (5, 4, 4),
    "bert": (6, 0, 1),  # post-norm: residual readers, the last one is the base model's output, and a tied decoder
    "t5": (12, 10, 11),  # the encoder's final norm is an output too; the head is tied
    "vit": (5, 4, 5),
    "cohere": (3, 2, 2),  # one norm feeds attention and MLP
    "mamba": (3, 2, 2),
}


@pytest.mark.parametrize("name", architectures.NAMES)
def test_sites_are_those_counted_by_hand_and_the_proof_passes(name):
    model = architectures.build(name)
    inputs = architectures.inputs(model)
    sites = fold_norm.find(lift(trace(model, inputs)), STOCK)
    applied = [site for site in sites if site.refused is None]
    assert (len(sites), len(applied)) == SITES[name][:2]
    few = fold_norm.find(lift(trace(model, inputs, outputs="logits")), STOCK)
    assert sum(site.refused is None for site in few) == SITES[name][2]
    assert all(site.refused != "" for site in sites)

    folded = taut.apply(model, example=inputs)
    assert type(folded) is type(model)
    evidence = taut.verify(model, folded)
    assert evidence.passed, evidence
    assert independent.distance(model, folded, inputs) < 1e-5 if applied else True


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral", "deepseek_v3", "t5"])
def test_an_outside_witness_sees_the_same_function(name):
    """Parameters in float64, so that nothing is rounded: two models, no taut in the comparison."""
    model = architectures.build(name).double()
    inputs = architectures.inputs(model)
    folded = taut.apply(model, example=inputs)
    changed = dict(folded.named_parameters())
    assert any(not torch.equal(p, changed[n]) for n, p in model.named_parameters())
    assert independent.distance(model, folded, inputs) < 1e-12


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_twice_changes_nothing(name):
    model = architectures.build(name)
    graph = lift(trace(model, architectures.inputs(model)))
    folded = fold_norm.apply(graph, form=STOCK)
    again = fold_norm.find(folded, STOCK)
    assert all(site.refused for site in again)
    assert sum("already folded" in site.refused for site in again) == SITES[name][1]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma2"])
def test_verify_fails_when_any_tensor_is_off_by_a_hundredth(name):
    model = architectures.build(name)
    inputs = architectures.inputs(model)
    folded = taut.apply(model, example=inputs)
    for parameter_name in folded.taut_plan_writes:
        parameter = folded.get_parameter(parameter_name)
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.mul_(1.01).add_(0.01 if bool((kept == 0).all()) else 0.0)
        assert not taut.verify(model, folded, inputs).passed, parameter_name
        with torch.no_grad():
            parameter.copy_(kept)
    assert taut.verify(model, folded).passed


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_the_proof_fails_when_any_reader_is_skipped(name):
    from taut.proof import prove
    from taut.values import Original

    model = architectures.build(name)
    inputs = architectures.inputs(model)
    raw = trace(model, inputs)
    folded = fold_norm.apply(lift(raw), form=STOCK)
    for skipped in folded.changed():
        after = raw.copy()
        after.values = folded.values | {skipped: Original(skipped)}
        evidence = prove(raw, after, [inputs])
        assert not evidence.passed, skipped
        assert evidence.float64_error > 1e-6


class Block(nn.Module):
    """A norm with whatever reads it; the hook `body` is the test's."""

    def __init__(self, body, norm=None, **layers):
        super().__init__()
        self.norm = norm or nn.RMSNorm(16, eps=1e-6)
        self.body = body
        for name, layer in layers.items():
            setattr(self, name, layer)
        with torch.no_grad():
            for parameter in self.norm.parameters():
                parameter.add_(0.5 * torch.rand_like(parameter))

    def forward(self, x):
        return self.body(self, self.norm(x))


def only_site(model, x=None, form=TAUT):
    graph = lift(trace(model.eval(), {"x": torch.randn(2, 5, 16) if x is None else x}))
    (site,) = fold_norm.find(graph, form)
    return site


L = nn.Linear
REFUSED = {
    "residual": (lambda m, y: m.a(y) + y, {"a": L(16, 16)}, "add"),
    "returned": (lambda m, y: (m.a(y), y), {"a": L(16, 16)}, "output"),
    "nonlinearity": (lambda m, y: m.a(y.relu()), {"a": L(16, 16)}, "relu"),
    "product with itself": (lambda m, y: m.a(y * y), {"a": L(16, 16)}, "mul"),
    "divisor": (lambda m, y: m.a(1.0 / y), {"a": L(16, 16)}, "reciprocal"),
    "softmax": (lambda m, y: m.a(y.softmax(-1)), {"a": L(16, 16)}, "softmax"),
    "sum over features": (lambda m, y: m.a(y) * y.sum(-1, keepdim=True), {"a": L(16, 16)}, "sum"),
    "joined with another": (lambda m, y: m.a(y + m.b.weight[0]), {"a": L(16, 16), "b": L(16, 16)}, "add"),
    "transposed into the product": (lambda m, y: m.a(y.transpose(-1, -2)), {"a": L(5, 5)}, "mixed"),
    "rolled along the features of one half": (
        lambda m, y: m.a(y.cat_it(y) if hasattr(y, "cat_it") else torch.cat([y, y.abs()], -1)),
        {"a": L(32, 16)},
        "abs",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_would_change_the_model(case):
    body, layers, reason = REFUSED[case]
    site = only_site(Block(body, **layers))
    assert site.refused is not None
    assert reason in site.refused


FOLDED = {
    "one reader": (lambda m, y: m.a(y), {"a": L(16, 16)}),
    "through views": (lambda m, y: m.a(y.view(10, 16)).view(2, 5, 16), {"a": L(16, 16)}),
    "merged patches": (lambda m, y: m.a(y[:, :4].reshape(2, 2, 32)), {"a": L(32, 16)}),
    "flipped features": (lambda m, y: m.a(y.flip(-1)), {"a": L(16, 16)}),
    "split features": (lambda m, y: m.a(y[..., :8]) + m.b(y[..., 8:]), {"a": L(8, 16), "b": L(8, 16)}),
    "pooled": (lambda m, y: m.a(y.mean(1)), {"a": L(16, 16)}),
    "gated by another value": (lambda m, y: m.a(y * torch.sigmoid(m.b(y))), {"a": L(16, 16), "b": L(16, 1)}),
    "convolution": (
        lambda m, y: m.a(y.transpose(1, 2)).transpose(1, 2),
        {"a": nn.Conv1d(16, 16, 3, padding=1)},
    ),
    "depthwise": (
        lambda m, y: m.a(y.transpose(1, 2)).transpose(1, 2),
        {"a": nn.Conv1d(16, 16, 3, groups=16)},
    ),
    "mixed over tokens": (lambda m, y: m.a(m.b.weight @ y), {"a": L(16, 16), "b": L(5, 5)}),
}


@pytest.mark.parametrize("case", FOLDED)
@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
def test_folds_into_every_kind_of_reader(case, norm):
    from taut.proof import prove

    body, layers = FOLDED[case]
    model = Block(body, norm(16, eps=1e-5), **layers).eval()
    inputs = {"x": torch.randn(2, 5, 16)}
    raw = trace(model, inputs)
    graph = fold_norm.apply(lift(raw), form=STOCK)
    (site,) = fold_norm.find(lift(raw), STOCK)
    if norm is nn.LayerNorm and case in ("gated by another value", "convolution", "depthwise", "mixed over tokens"):
        assert "bias" in site.refused
        return
    assert site.refused is None
    assert prove(raw, graph, [inputs]).passed


def test_a_shared_gain_folds_at_all_of_its_sites_or_at_none():
    class Shared(nn.Module):
        def __init__(self, second):
            super().__init__()
            self.norm, self.a, self.b, self.second = nn.RMSNorm(16), L(16, 16), L(16, 16), second

        def forward(self, x):
            x = x + self.a(self.norm(x))
            y = self.norm(x)
            return x + self.b(y) if self.second else x + y

    x = torch.randn(2, 5, 16)
    for second in (True, False):
        sites = fold_norm.find(lift(trace(Shared(second).eval(), {"x": x})), STOCK)
        assert [site.refused is None for site in sites] == [second, second]


def test_a_weight_that_two_norms_read_folds_only_if_they_share_the_gain():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.a = nn.RMSNorm(16), nn.RMSNorm(16), L(16, 16)

        def forward(self, x):
            return self.a(self.one(x)) + self.a(self.two(x))

    sites = fold_norm.find(lift(trace(Two().eval(), {"x": torch.randn(2, 5, 16)})), STOCK)
    assert len(sites) == 2
    assert all("otherwise" in site.refused for site in sites)


def test_found_by_listing_the_folder():
    assert rewrites()["fold_norm"] is fold_norm
