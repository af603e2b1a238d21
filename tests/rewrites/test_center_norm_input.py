"""center_norm_input: hand-counted sites, proof, and every reason to refuse."""

import pytest
import torch
import torch.nn.functional as F
from scales import L, hand_made, some, traced
from torch import nn

from taut.ops.layer_norm import layer_norm
from taut.ops.rms_norm import rms_norm
from taut.proof import prove
from taut.rewrite import STOCK
from taut.rewrites.center_norm_input import center_norm_input
from taut.rewrites.fold_norm import fold_norm

# Counted by hand from the modeling code, two layers each: LayerNorms in all, and centred; parameters that write.
SITES = {
    "gpt2_untied": (5, 5, 10),  # two tables, and the weight and bias of two projections a layer
    "gpt_neox": (5, 5, 9),  # one table
    "vit": (5, 5, 12),  # a convolution with bias, the class token, positions
    "gpt2": (5, 0, 0),  # tied embedding
    "opt": (5, 0, 0),
    "opt_untied": (5, 5, 10),
    "cohere": (3, 0, 0),
    "bert": (6, 0, 0),  # post-norm, tied decoder; the head's norm reads a GELU
    "llama": (0, 0, 0),
    "t5": (0, 0, 0),
}


@pytest.mark.parametrize("name", some(SITES))
def test_sites_are_those_counted_by_hand_and_the_proof_passes(name):
    raw, lifted, inputs = traced(name)
    sites = center_norm_input.find(lifted)
    applied = [site for site in sites if site.refused is None]
    assert (len(sites), len(applied)) == SITES[name][:2]
    assert all(len(site.writes) == SITES[name][2] for site in applied)
    centred = center_norm_input.apply(lifted)
    assert len(list(centred.calls(layer_norm))) == len(sites) - len(applied)
    evidence = prove(raw, centred, [inputs])
    assert evidence.passed, evidence
    assert evidence.tensors_checked == SITES[name][2]
    again = center_norm_input.find(centred)
    assert all(site.refused for site in again)


def test_only_the_taut_form_changes_an_op():
    assert center_norm_input.find(traced("gpt2_untied")[1], STOCK) == []


def test_tied_parameters_are_named():
    (site, *_) = center_norm_input.find(traced("gpt2")[1])
    assert site.refused is not None
    assert "transformer.wte.weight (tied to lm_head.weight) is also read by linear in lm_head" in site.refused


def test_norms_of_one_stream_go_together():
    _, lifted, _ = traced("gpt2_untied")
    with pytest.raises(ValueError, match=r"shares a parameter with transformer.h.0.ln_2: both or neither"):
        center_norm_input.apply(lifted, ["transformer.h.0.ln_1"])


@pytest.mark.parametrize("order", [(fold_norm, center_norm_input), (center_norm_input, fold_norm)])
def test_it_composes_with_folding_in_either_order(order):
    """Without biases; a bias of the norm's must be folded first."""
    layers = {
        "table": nn.Embedding(9, 16), "wide": L(16, 24), "back": L(24, 16, bias=False), "head": L(16, 4, bias=False),
        "one": nn.LayerNorm(16, bias=False), "two": nn.LayerNorm(16, bias=False),
    }  # fmt: skip

    def body(m, x):
        h = m.table(x[..., 0].abs().long() % 9)
        h = h + m.back(F.gelu(m.wide(m.one(h))))
        return m.head(m.two(h))

    raw, graph, inputs = hand_made(body, **layers)
    for rewrite in order:
        assert [site.refused for site in rewrite.find(graph)] == [None, None]
        graph = rewrite.apply(graph)
    evidence = prove(raw, graph, [inputs])
    assert evidence.passed, evidence
    assert set(graph.changed()) >= {"table.weight", "back.weight", "wide.weight", "head.weight"}


def test_a_folded_gain_and_bias_fall_away():
    raw, lifted, inputs = traced("gpt2_untied")
    centred = center_norm_input.apply(fold_norm.apply(lifted))
    gains = [node.args[1] for node in centred.calls(rms_norm)]
    assert [gain is None for gain in gains] == [True] * 4 + [False]
    assert "transformer.h.0.ln_1.weight" not in centred.values
    assert "transformer.ln_f.bias" in centred.values
    evidence = prove(raw, centred, [inputs])
    assert evidence.passed, evidence


def sites(body, **layers):
    raw, graph, inputs = hand_made(body, **layers)
    found = center_norm_input.find(graph)
    evidence = prove(raw, center_norm_input.apply(graph), [inputs])
    assert evidence.passed, evidence
    return [site.refused for site in found]


def norm(x):
    return F.layer_norm(x, x.shape[-1:])


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: norm(m.a(x)),
        lambda m, x: norm(m.a(x) + m.b(F.relu(x))),
        lambda m, x: norm(m.a(x) + m.a(F.relu(x))),  # one weight, used twice in the same way
        lambda m, x: norm(m.a(x) * torch.sigmoid(x[..., :1])),
        lambda m, x: norm(torch.softmax(x @ x.mT, -1) @ m.a(x)),
        lambda m, x: norm(torch.cat((m.a(x), m.b(x)), 1)),
        lambda m, x: norm(m.a(x)[:, :3].mean(1)),
        lambda m, x: norm((m.a(x).to(torch.float64) - 2.0 * m.b(x)).float()),
        lambda m, x: norm(F.dropout(m.a(x), 0.5, m.training)),
    ],
)
def test_streams_that_can_be_centred(body):
    assert sites(body, a=L(16, 16), b=L(16, 16, bias=False)) == [None]


def test_a_convolution_with_tokens_and_positions():
    def body(m, x):
        h = m.conv(x.mT).mT
        h = torch.cat((m.token.weight.expand(2, -1, -1), h), 1) + m.position(torch.arange(5))
        return norm(h)

    layers = {"conv": nn.Conv1d(16, 8, 3), "token": nn.Embedding(1, 8), "position": nn.Embedding(5, 8)}
    assert sites(body, **layers) == [None]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda m, x: norm(x), "the input x"),
        (lambda m, x: norm(F.relu(m.a(x))), "relu"),
        (lambda m, x: norm(m.a(x) + x), "the input x"),
        (lambda m, x: norm(m.a(x) + 1.0), "add"),
        (lambda m, x: norm(m.a(x) * m.gain.weight[0]), "mul"),
        (lambda m, x: (norm(h := m.a(x)), h), "is an output of the model"),
        (lambda m, x: norm(h := m.a(x)) + F.rms_norm(h, (16,), eps=1e-6), "is also read by rms_norm"),
        (lambda m, x: norm(h := m.a(x)) + m.b(h), "is also read by linear in b"),
        (lambda m, x: norm(h := m.a(x)) * h.mean(-1, keepdim=True), "is also read by mean"),
        (lambda m, x: norm(h := m.a(x)) + h[..., :1], "is also read by slice"),
        (lambda m, x: norm(m.a(x)) + F.relu(m.a(x)), "relu"),  # the weight writes elsewhere too
        (lambda m, x: norm(m.a(x)) + x @ m.a.weight, "is also read by linear"),
        (lambda m, x: norm(m.a(x).unflatten(-1, (2, 8))), "unflatten"),
        (lambda m, x: norm(m.a(x)[..., :8]), "slice"),
        (lambda m, x: norm(m.a(x).cumsum(1)), "cumsum"),  # no rule for it
    ],
)
def test_every_reason_to_refuse(body, reason):
    layers = {"a": L(16, 16), "b": L(16, 16, bias=False), "gain": nn.Embedding(1, 16)}
    refusals = sites(body, **layers)
    assert len(refusals) == 1
    assert refusals[0] is not None
    assert reason in refusals[0]


def test_an_input_with_mean_zero_needs_no_writer():
    _, graph, _ = hand_made(lambda m, x: m.two(norm(x) + norm(x * 2)), two=nn.LayerNorm(16))
    first, second, third = center_norm_input.find(graph)
    assert first.refused
    assert second.refused
    assert third.refused is None
    assert third.writes == ()
    assert sites(lambda m, x: m.two(norm(x) + norm(x * 2)), two=nn.LayerNorm(16))[2] is None
