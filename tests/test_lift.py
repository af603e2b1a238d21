"""Lifting of rope, attention and GLU: hand-counted on models, the same function in float64, and what is left alone."""

import architectures
import pytest
import torch
import torch.nn.functional as F
from scales import hand_made, some, traced
from torch import nn

from taut.lift import lift
from taut.ops.attention import attention
from taut.ops.glu import glu
from taut.ops.rope import rope
from taut.rewrites.fold_norm import fold_norm
from taut.tracing import trace

aten = torch.ops.aten

# Counted by hand from the modeling code, two layers each: rope (q and k), attention, gated feed-forwards.
WORDS = {
    "llama": (4, 2, 2),
    "qwen3": (4, 2, 2),
    "gemma2": (4, 2, 2),  # eager attention with a softcap
    "olmo2": (4, 2, 2),
    "mixtral": (4, 2, 2),
    "deepseek_v3": (4, 2, 3),  # one dense layer; routed and shared experts in the other
    "gpt_neox": (4, 2, 0),  # a quarter of each head is rotated
    "gpt2": (0, 2, 0),
    "bert": (0, 2, 0),
    "t5": (0, 6, 0),  # relu, not gated
    "vit": (0, 2, 0),
    "cohere": (4, 2, 2),  # interleaved
    "opt": (0, 2, 0),
    "mamba": (0, 0, 2),  # the scan's output times silu of the gate
}


def count(graph, *targets):
    return sum(1 for _ in graph.calls(*targets))


def same(raw, lifted, inputs):
    before, after = raw.run(inputs, float64=True), lifted.run(inputs, float64=True)
    return max(((before[k] - after[k]).abs().max() / before[k].abs().max()).item() for k in before)


@pytest.mark.parametrize("name", some(WORDS))
def test_words_are_those_counted_by_hand_and_the_function_is_the_same(name):
    raw, lifted, inputs = traced(name)
    assert (count(lifted, rope), count(lifted, attention), count(lifted, glu)) == WORDS[name]
    assert not count(lifted, aten.scaled_dot_product_attention.default)
    assert same(raw, lifted, inputs) <= 1e-12


def test_repeated_heads_are_taken_in():
    _, lifted, _ = traced("llama")
    for node in lifted.calls(attention):
        q, k, v = (part.meta["val"].shape for part in node.args[:3])
        assert (q[1], k[1], v[1]) == (6, 2, 2)


def test_softcap_and_scale_are_read_off():
    _, lifted, _ = traced("gemma2")
    for node in lifted.calls(attention):
        assert node.args[4:] == (256**-0.5, False, 50.0)


def rotated(x, cos, sin, interleaved):
    """The textbook rotation of pairs, by complex numbers."""
    half = x.shape[-1] // 2
    pairs = torch.stack((x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:]), -1)
    turn = torch.complex(*((t[..., ::2] if interleaved else t[..., :half]).contiguous() for t in (cos, sin)))
    y = torch.view_as_real(torch.view_as_complex(pairs) * turn)
    return y.flatten(-2) if interleaved else torch.cat((y[..., 0], y[..., 1]), -1)


def halves(x, cos, sin):
    one, two = x.chunk(2, -1)
    return torch.cat((-two, one), -1) * sin + x * cos


def pairs(x, cos, sin):
    return cos * x + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin


def two_products(x, cos, sin):
    one, two = x.chunk(2, -1)
    cos, sin = cos[..., :8], sin[..., :8]
    return torch.cat((one * cos - two * sin, two * cos + one * sin), -1)


def complex_numbers(x, cos, sin):
    turn = torch.complex(cos[..., ::2].contiguous(), sin[..., ::2].contiguous())
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


def partial(x, cos, sin):
    head, tail = x[..., :8], x[..., 8:]
    return torch.cat((halves(head, cos[..., :8], sin[..., :8]), tail), -1)


def half_turned_backwards(x, cos, sin):
    one, two = x.chunk(2, -1)
    return x * cos + torch.cat((two, -one), -1) * sin


def not_turned(x, cos, sin):
    return x * cos + x.flip(-1) * sin


def angles(interleaved):
    table = torch.arange(6.0)[:, None] * torch.tensor([10.0]) ** (-torch.arange(8.0) / 8)
    full = table.repeat_interleave(2, -1) if interleaved else torch.cat((table, table), -1)
    return full.cos(), full.sin()


@pytest.mark.parametrize(
    ("spelling", "interleaved"), [(halves, False), (pairs, True), (two_products, False), (complex_numbers, True)]
)
def test_every_spelling_of_rope_is_the_textbook_rotation(spelling, interleaved):
    cos, sin = angles(interleaved)
    _, lifted, inputs = hand_made(lambda m, x: spelling(x, cos, sin))
    node = next(lifted.calls(rope))
    assert count(lifted, rope) == 1
    assert node.args[3] is interleaved
    expected = rotated(inputs["x"].double(), cos.double(), sin.double(), interleaved)
    assert torch.allclose(lifted.run(inputs, float64=True)["output"], expected, rtol=0, atol=1e-14)


def test_the_part_of_a_head_that_passes_unchanged_is_taken_in():
    raw, lifted, inputs = hand_made(lambda m, x: partial(x, *angles(False)))
    node = next(lifted.calls(rope))
    assert node.args[0].op == "placeholder"
    assert lifted.output.args[0][0] is node
    assert same(raw, lifted, inputs) == 0


@pytest.mark.parametrize("spelling", [half_turned_backwards, not_turned])
def test_what_is_not_that_rotation_is_left_alone(spelling):
    raw, lifted, inputs = hand_made(lambda m, x: spelling(x, *angles(False)))
    assert count(lifted, rope) == 0
    assert same(raw, lifted, inputs) == 0


def new_gelu(x):
    return 0.5 * x * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (F.silu, "silu"),
        (lambda x: x * torch.sigmoid(x), "silu"),
        (F.gelu, "gelu"),
        (lambda x: x * 0.5 * (1.0 + torch.erf(x / 2**0.5)), "gelu"),
        (new_gelu, "gelu_tanh"),
        (F.relu, "relu"),
        (torch.sigmoid, "sigmoid"),
        (lambda x: x * torch.sigmoid(1.702 * x), None),
        (torch.tanh, None),
    ],
)
def test_an_activation_is_known_by_its_values(act, name):
    raw, lifted, inputs = hand_made(lambda m, x: m.up(x) * act(m.gate(x)), gate=nn.Linear(16, 8), up=nn.Linear(16, 8))
    assert [node.args[2] for node in lifted.calls(glu)] == ([name] if name else [])
    assert same(raw, lifted, inputs) <= 1e-14


def test_an_activation_alone_is_no_gated_unit():
    _, lifted, _ = hand_made(lambda m, x: x * torch.sigmoid(1.702 * x) + F.silu(x) * x)
    assert count(lifted, glu) == 0


class Eager(nn.Module):
    """Attention written out, with whatever stands between the scores and the softmax."""

    def __init__(self, between):
        super().__init__()
        self.between = between
        torch.manual_seed(2)
        self.sinks = nn.Parameter(torch.randn(4))

    def forward(self, q, k, v):
        return torch.softmax(self.between(self, q @ k.transpose(-1, -2)), -1) @ v


def attend(between):
    generator = torch.Generator().manual_seed(4)
    inputs = {name: torch.randn(2, 4, 5, 8, generator=generator) for name in "qkv"}
    raw = trace(Eager(between).eval(), inputs)
    return raw, lift(raw), inputs


NEARER = -(torch.arange(5.0)[:, None] - torch.arange(5.0)).abs()
LATER = torch.ones(5, 5, dtype=torch.bool).triu(1)


@pytest.mark.parametrize(
    ("between", "options"),
    [
        (lambda m, s: s * 0.3, (0.3, False)),
        (lambda m, s: s / 4.0 + NEARER, (0.25, False)),
        (lambda m, s: (s * 0.5).masked_fill(LATER, float("-inf")), (0.5, False)),
        (
            lambda m, s: 20.0 * torch.tanh(s * 0.5 / 20.0) + torch.zeros(5, 5).masked_fill(LATER, -1e38),
            (0.5, False, 20.0),
        ),
        (lambda m, s: (s + NEARER) * 0.5, (0.5, False)),
        (lambda m, s: (s.masked_fill(LATER, -1e38) * 3.0 + NEARER) / 4.0, (0.75, False)),
        (lambda m, s: torch.maximum(s * 0.5 + NEARER, torch.full((), -1e38)), (0.5, False)),
    ],
)
def test_the_eager_spelling_is_read_as_attention(between, options):
    raw, lifted, inputs = attend(between)
    node = next(lifted.calls(attention))
    assert node.args[4:] == pytest.approx(options)
    assert same(raw, lifted, inputs) <= 1e-14


@pytest.mark.parametrize(
    "between",
    [
        lambda m, s: torch.maximum(s, torch.full((), -10.0)),  # a score may be lower
        lambda m, s: (s * 0.5).masked_fill(LATER, -10.0),  # hidden scores can still be seen
        lambda m, s: torch.relu(s),
    ],
)
def test_other_scores_are_left_alone(between):
    raw, lifted, inputs = attend(between)
    assert count(lifted, attention) == 0
    assert same(raw, lifted, inputs) == 0


def test_a_sink_is_one_more_score_a_head():
    def with_sink(q, k, v, sinks):
        scores = torch.cat((q @ k.transpose(-1, -2) * 0.5, sinks.view(1, -1, 1, 1).expand(2, -1, 5, 1)), -1)
        return torch.softmax(scores - scores.max(-1, keepdim=True).values, -1)[..., :-1] @ v

    class Sinking(Eager):
        def forward(self, q, k, v):
            return with_sink(q, k, v, self.sinks)

    _, _, inputs = attend(lambda m, s: s * 0.5)
    raw = trace(Sinking(None).eval(), inputs)
    lifted = lift(raw)
    node = next(lifted.calls(attention))
    assert node.args[8].meta["tensor"] == "sinks"
    assert same(raw, lifted, inputs) <= 1e-14


def test_lifting_takes_no_site_from_fold_norm():
    """A gated norm's gain goes through the GLU to the product behind it."""
    layers = {"norm": nn.RMSNorm(16, eps=1e-6), "gate": nn.Linear(16, 16), "out": nn.Linear(16, 4)}
    raw, lifted, inputs = hand_made(lambda m, x: m.out(m.norm(x) * F.silu(m.gate(x))), **layers)
    assert count(lifted, glu) == 1
    assert [site.refused for site in fold_norm.find(lifted)] == [None]
    folded = fold_norm.apply(lifted)
    assert same(raw, folded, inputs) <= 1e-14


def test_a_symbolic_trace_is_lifted_alike_and_runs_at_another_length():
    """Nothing that lifting puts in may hold a length."""
    model = architectures.build("gpt_neox")
    raw = trace(model, architectures.inputs(model), symbolic=True)
    lifted = lift(raw)
    assert (count(lifted, rope), count(lifted, attention)) == WORDS["gpt_neox"][:2]
    assert same(raw, lifted, architectures.inputs(model, batch=3, length=11)) <= 1e-12
