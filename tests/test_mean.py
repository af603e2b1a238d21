"""Zero mean and its dual: rules one by one, and a random-graph oracle that runs every claim."""

import random

import pytest
import torch
import torch.nn.functional as F
from scales import hand_made, traced
from torch import Tensor, fx, nn

from taut.facts.mean import Means, centred_axes, zero_mean
from taut.graph import Graph, shape
from taut.ops.layer_norm import layer_norm
from taut.ops.linear import linear
from taut.proof import prove
from taut.rewrites.center_norm_input import center_norm_input
from taut.values import Affine, Centred, Filled, Original, Scaled, Shifted

aten = torch.ops.aten
W = Original("w")


def is_zero(body, **layers):
    """Whether the last value has mean zero along its last axis, by the facts; with `w` and `b` centred."""
    _, graph, _ = hand_made(body, **layers)
    for name in [n for n in graph.values if n.startswith("centred")]:
        graph.values[name] = Centred(graph.values[name], 0)
    (result,) = graph.output.args[0]
    return Means(graph).is_zero(result, len(shape(result)) - 1)


def plain(x):
    return F.layer_norm(x, x.shape[-1:])


@pytest.mark.parametrize(
    "keeps",
    [
        plain,
        lambda x: plain(x) + plain(x * 2),
        lambda x: plain(x) - 3.0 * plain(x * 2),
        lambda x: -plain(x) / 7.0,
        lambda x: plain(x) * torch.sigmoid(x[..., :1]),
        lambda x: torch.softmax(x @ x.transpose(-1, -2), -1) @ plain(x),
        lambda x: torch.cat((plain(x), plain(x * 2)), 1),
        lambda x: torch.stack((plain(x), plain(x * 2)), 1).sum(1),
        lambda x: plain(x)[:, 1:3],
        lambda x: plain(x).flip(-1),
        lambda x: plain(x).transpose(1, 2).transpose(1, 2),
        lambda x: plain(x).unflatten(1, (2, 3)).flatten(0, 1),
        lambda x: plain(x).mean(1, keepdim=True),
        lambda x: plain(x).masked_fill(x[..., :1] > 0, 0.0),
        lambda x: torch.where(x[..., :1] > 0, plain(x), plain(x * 2)),
        lambda x: plain(x).to(torch.float64),
        lambda x: F.rms_norm(plain(x), (16,)),
        lambda x: plain(x).split(3, 1)[1],
    ],
)
def test_what_keeps_mean_zero(keeps):
    assert is_zero(lambda m, x: keeps(x))


@pytest.mark.parametrize(
    "breaks",
    [
        lambda x: x,
        lambda x: F.rms_norm(x, (16,)),
        lambda x: plain(x) + x,
        lambda x: plain(x) + 1.0,
        lambda x: plain(x) + x[..., :1],
        lambda x: F.relu(plain(x)),
        lambda x: plain(x) * x,
        lambda x: x[..., :1] / plain(x),
        lambda x: plain(x)[..., :8],
        lambda x: plain(x).unflatten(-1, (2, 8)),
        lambda x: plain(x).transpose(1, 2),
        lambda x: torch.cat((plain(x), plain(x)[..., :4]), -1),
        lambda x: plain(x).masked_fill(x > 0, 0.0),
        lambda x: plain(x).masked_fill(x[..., :1] > 0, 1.0),
        lambda x: torch.where(x > 0, plain(x), plain(x * 2)),
        lambda x: plain(x).roll(1, -1)[..., 1:],
        lambda x: plain(x).cumsum(-1),
    ],
)
def test_what_breaks_it(breaks):
    assert not is_zero(lambda m, x: breaks(x))


def test_norms_with_parameters():
    assert not is_zero(lambda m, x: m.norm(x), norm=nn.LayerNorm(16))
    assert not is_zero(lambda m, x: m.norm(x), norm=nn.LayerNorm(16, bias=False))


def test_parameters_that_are_centred_make_mean_zero():
    assert is_zero(lambda m, x: m.centred(x), centred=nn.Linear(16, 8))
    assert is_zero(lambda m, x: m.centred(x.mT).mT, centred=nn.Conv1d(16, 8, 3, padding=1))
    assert not is_zero(lambda m, x: m.centred(x.mT), centred=nn.Conv1d(16, 8, 3))
    assert not is_zero(lambda m, x: m.centred(x.mT).mT, centred=nn.Conv1d(16, 16, 3, groups=16))
    assert not is_zero(lambda m, x: m.other(x), other=nn.Linear(16, 8))


@pytest.mark.parametrize(
    ("value", "axes"),
    [
        (W, set()),
        (Centred(W, 0), {0}),
        (Centred(Centred(W, 1), 0), {0, 1}),
        (Scaled(Centred(W, 0), W, 1), {0}),
        (Scaled(Centred(W, 0), W, 0), set()),
        (Centred(Scaled(W, W, 1), 0), {0}),
        (Affine(Centred(W, 0), 3.0, 0.0), {0}),
        (Affine(Centred(W, 0), 3.0, 1.0), set()),
        (Filled((4,), 0.0), {0, 1}),
        (Filled((4,), 1.0), set()),
        (Shifted(Centred(W, 0), Centred(W, 0), W, 1, 0), {0}),
        (Shifted(Centred(W, 0), W, W, 1, 0), set()),
        (Shifted(W, Centred(W, 0), W, 1, 0), set()),
    ],
)
def test_the_axes_of_a_value(value, axes):
    assert centred_axes(value, 2) == axes


def test_every_claim_on_a_centred_model_holds_when_it_is_run():
    _, lifted, inputs = traced("gpt2_untied")
    assert zero_mean(lifted) == {}
    centred = center_norm_input.apply(lifted)
    claims, checked = zero_mean(centred), 0

    def check(node, value, value_of):
        nonlocal checked
        if node in claims and isinstance(value, Tensor) and value.numel():
            assert value.mean(claims[node]).abs().max() <= 1e-13 * value.abs().max(), node
            checked += 1
        return value

    centred.run(inputs, float64=True, watch=check)
    assert checked == sum(node.op == "call_function" for node in claims) > 20


WIDTH, TOKENS = 6, 4


class Random:
    """A random graph of rules that keep, break and make zero mean, on (2, TOKENS, WIDTH) values."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        graph = fx.Graph()
        self.tensors: dict[str, Tensor] = {}
        x = graph.placeholder("x")
        x.meta = {"kind": "input", "tensor": "x", "val": torch.empty(2, TOKENS, WIDTH, device="meta"), "where": ""}
        out = graph.output(())
        self.graph = Graph(graph, self.tensors, {}, {}, ())
        self.out = out
        self.values = [self.written()]
        for _ in range(self.random.randint(3, 9)):
            self.values.append(self.step())
        returned = [self.call(aten.tanh.default, self.read())]
        if self.random.random() < 0.15:
            returned.append(self.pick())
        out.args = (tuple(returned),)
        self.graph.outputs = tuple(f"y{i}" for i in range(len(returned)))
        self.graph.fx.eliminate_dead_code()

    def pick(self):
        return self.random.choice(self.values[-4:])

    def parameter(self, *size):
        shared = [n for n in self.graph.placeholders("parameter").values() if shape(n) == size]
        if shared and self.random.random() < 0.1:
            return self.random.choice(shared)
        name = f"p{len(self.tensors)}"
        self.tensors[name] = torch.randn(*size)
        node = self.graph.add_parameter(name, Original(name), self.tensors[name])
        del self.graph.written[name]
        return node

    def call(self, target, *args):
        return self.graph.insert(target, args, self.out)

    def written(self):
        """A product's output; its input is never the stream itself."""
        source = next(n for n in self.graph.nodes if n.op == "placeholder" and n.meta["kind"] == "input")
        bias = self.parameter(WIDTH) if self.random.random() < 0.5 else None
        return self.call(linear, source, self.parameter(WIDTH, WIDTH), bias)

    def read(self):
        """A norm of the stream, then a product: the usual reader."""
        gain = self.parameter(WIDTH) if self.random.random() < 0.5 else None
        normed = self.call(layer_norm, self.pick(), gain, None, 1e-5)
        return self.call(linear, normed, self.parameter(WIDTH, WIDTH))

    def step(self):
        x = self.pick()
        rare = self.random.random() < 0.12
        if rare:
            return self.random.choice(
                [
                    lambda: self.call(aten.relu.default, x),
                    lambda: self.call(aten.mul.Tensor, x, self.parameter(WIDTH)),
                    lambda: self.call(aten.add.Tensor, x, 1.0),
                    lambda: self.call(aten.cumsum.default, x, 2),
                    lambda: self.call(aten.roll.default, x, [1, 1], [1, 2]),
                ]
            )()
        return self.random.choice(
            [
                lambda: self.call(aten.add.Tensor, x, self.read()),
                lambda: self.call(aten.add.Tensor, x, self.read()),
                lambda: self.call(aten.add.Tensor, x, self.written()),
                lambda: self.call(aten.add.Tensor, x, self.parameter(TOKENS, WIDTH)),
                lambda: self.call(aten.sub.Tensor, x, self.pick()),
                lambda: self.call(aten.mul.Tensor, x, 0.5),
                lambda: self.call(aten.flip.default, x, [2]),
                lambda: self.call(layer_norm, x, None, None, 1e-5),
                lambda: self.call(aten.bmm.default, self.call(aten.softmax.int, self.mixing(), -1), x),
                lambda: self.call(
                    aten.reshape.default, self.call(aten.reshape.default, x, [-1, WIDTH]), list(shape(x))
                ),
            ]
        )()

    def mixing(self):
        q = self.read()
        return self.call(aten.bmm.default, q, self.call(aten.transpose.int, q, 1, 2))


@pytest.mark.parametrize("first", [0, 60, 120])
def test_random_graphs_find_no_claim_that_is_false(first):
    """Every zero mean is zero when it is run, and what is centred computes the same; refusing all would not pass."""
    applied = refused = claimed = 0
    for seed in range(first, first + 60):
        graph = Random(seed).graph
        inputs = {"x": torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))}
        claimed += run_claims(graph, inputs)
        sites = center_norm_input.find(graph)
        refused += sum(site.refused is not None for site in sites)
        applied += sum(site.refused is None for site in sites)
        after = center_norm_input.apply(graph)
        before, now = graph.run(inputs, float64=True), after.run(inputs, float64=True)
        for name, true in before.items():
            assert (now[name] - true).abs().max() <= 1e-12 * max(1.0, true.abs().max()), (seed, name)
        claimed += run_claims(after, inputs)
    assert min(applied, refused, claimed) > 30, (applied, refused, claimed)


def run_claims(graph, inputs):
    claims = Means(graph).zero

    def check(node, value, value_of):
        for axis in claims.get(node, ()):
            assert value.mean(axis).abs().max() <= 1e-12 * max(1.0, value.abs().max()), node
        return value

    graph.run(inputs, float64=True, watch=check)
    return len(claims)


def test_a_site_skipped_or_a_writer_forgotten_fails_the_proof():
    raw, lifted, inputs = traced("gpt2_untied")
    centred = center_norm_input.apply(lifted)
    assert prove(raw, centred, [inputs]).passed
    for name in centred.changed():
        wrong = centred.copy()
        wrong.values[name] = Original(name)
        assert not prove(raw, wrong, [inputs]).passed, name
