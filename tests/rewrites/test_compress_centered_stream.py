"""compress_centered_stream: hand-counted parameters, proof, composition, and every reason to refuse."""

import pytest
import scales
import torch
import torch.nn.functional as F
from scales import L, hand_made, traced
from torch import nn

from taut.lift import lift
from taut.ops.crms_norm import crms_norm
from taut.ops.rms_norm import rms_norm
from taut.proof import prove
from taut.rewrite import STOCK
from taut.rewrites.center_norm_input import center_norm_input
from taut.rewrites.compress_centered_stream import compress_centered_stream
from taut.rewrites.fold_norm import fold_norm
from taut.tracing import trace

# Width 48, two layers; a row of the embedding and of each position, one of every weight and bias that writes, and a
# column of every weight that reads. The final norms are outputs, and so keep every feature.
FEWER = {
    "gpt2_untied": 99 + 64 + 2 * (48 + 1 + 192 + 1) + 2 * (144 + 192),
    "opt_untied": 99 + 64 + 2 * (48 + 1 + 80 + 1) + 2 * (144 + 80),
    "gpt_neox": 99 + 2 * (48 + 1 + 80 + 1) + 2 * (144 + 80),
    "vit": (3 * 4 * 4 + 1) + 1 + 17 + 2 * (48 + 1 + 80 + 1) + 2 * (3 * 48 + 80),
}


def parameters(graph) -> int:
    return sum(graph.evaluate(name).numel() for name in graph.values)


def centred(graph):
    return center_norm_input.apply(fold_norm.apply(graph))


@pytest.mark.parametrize("name", scales.some(FEWER))
def test_the_parameters_are_as_many_fewer_as_counted_by_hand_and_the_proof_passes(name):
    raw, lifted, inputs = traced(name)
    before = centred(lifted)
    (site,) = compress_centered_stream.find(before)
    after = compress_centered_stream.apply(before)
    assert parameters(before) - parameters(after) == FEWER[name]
    assert site.note == f"5 norms read the stream; {FEWER[name]} parameters fewer"
    assert (len(list(after.calls(crms_norm))), len(list(after.calls(rms_norm)))) == (5, 0)
    assert [norm.args[3] for norm in after.calls(crms_norm)] == [False] * 4 + [True]
    evidence = prove(raw, after, [inputs])
    assert evidence.passed, evidence
    assert compress_centered_stream.find(after) == []


def test_every_value_has_the_shape_it_says():
    _, lifted, inputs = traced("gpt2_untied")
    after = compress_centered_stream.apply(centred(lifted))

    def watch(node, value, value_of):
        if isinstance(value, torch.Tensor):
            assert value.shape == node.meta["val"].shape, node
        return value

    after.run(inputs, watch=watch)
    for name, node in after.placeholders("parameter").items():
        assert after.evaluate(name).shape == node.meta["val"].shape


def test_a_norm_with_a_gain_gives_the_last_feature_back():
    raw, lifted, inputs = traced("gpt2_untied")
    after = compress_centered_stream.apply(center_norm_input.apply(lifted))
    assert all(shape == 48 for shape in (norm.meta["val"].shape[-1] for norm in after.calls(crms_norm)))
    evidence = prove(raw, after, [inputs])
    assert evidence.passed, evidence


def test_rows_are_evaluated_as_the_whole_is():
    _, lifted, _ = traced("gpt2_untied")
    after = compress_centered_stream.apply(centred(lifted))
    for name, value in after.changed().items():
        whole = after.evaluate(name)
        rows = slice(1, min(5, len(whole)))
        read = lambda n, r: after.tensors[n] if r is None else after.tensors[n][r]  # noqa: E731
        assert torch.equal(value.evaluate(read, rows), whole[rows]), name


def test_nothing_is_compressed_before_it_is_centred():
    refusals = [site.refused for site in compress_centered_stream.find(traced("gpt2_untied")[1])]
    assert len(refusals) == 5
    assert all("center_norm_input comes first" in reason for reason in refusals)
    assert compress_centered_stream.find(traced("llama")[1]) == []
    assert compress_centered_stream.find(centred(traced("gpt2_untied")[1]), STOCK) == []


def norm(x):
    return F.layer_norm(x, x.shape[-1:])


def applied(body, **layers) -> list[str | None]:
    raw, graph, inputs = hand_made(body, **layers)
    graph = center_norm_input.apply(graph)
    found = compress_centered_stream.find(graph)
    evidence = prove(raw, compress_centered_stream.apply(graph), [inputs])
    assert evidence.passed, evidence
    return [site.refused for site in found]


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: m.b(norm(m.a(x))),
        lambda m, x: norm(m.a(x)),  # an output needs every feature
        lambda m, x: m.b(norm(m.a(x)).relu()),
        lambda m, x: m.b(norm(m.a(x) * torch.sigmoid(x[..., :1]) - m.a(x.relu()) / 3)),
        lambda m, x: m.b(norm(torch.cat((m.a(x), m.a(x.relu())), 1)[:, 2:9])),
        lambda m, x: m.b(norm(m.a(x)).reshape(-1, 16)).view(2, 6, 16) + x,
        lambda m, x: m.b(norm(m.a(x))) + m.b(x),  # the weight is read elsewhere too
        lambda m, x: m.b(norm(m.a(x).reshape(-1, 16)).view(2, 6, 16)),
    ],
)
def test_streams_that_can_be_compressed(body):
    assert applied(body, a=L(16, 16), b=L(16, 16, bias=False)) == [None]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda m, x: norm(torch.softmax(x @ x.mT, -1) @ m.a(x)), "matmul"),
        (lambda m, x: norm(m.a(x).flip(-1)), "flip"),
        (lambda m, x: norm(norm(m.a(x)) + m.a(x)), "rms_norm"),
    ],
)
def test_every_reason_to_refuse(body, reason):
    found = applied(body, a=L(16, 16))
    assert any(refusal is not None and reason in refusal for refusal in found)


def test_a_reader_that_needs_every_feature_refuses_a_stream_centred_by_hand():
    """Here nothing was centred by a rewrite: zero mean comes from a norm, whose parameters are none."""
    _, graph, _ = hand_made(lambda m, x: m.n(norm(x) + norm(x * 2)), n=nn.LayerNorm(16, bias=False))
    graph = center_norm_input.apply(graph)
    found = [site for site in compress_centered_stream.find(graph) if site.where == "n"]
    assert "which cannot leave a feature out" in found[0].refused


def test_in_bfloat16_it_is_at_most_twice_as_far_from_the_truth():
    model = scales.architectures.build("gpt2_untied", torch.bfloat16)
    inputs = scales.architectures.inputs(model)
    raw = trace(model, inputs)
    evidence = prove(raw, compress_centered_stream.apply(centred(lift(raw))), [inputs])
    assert evidence.passed, evidence


def test_nothing_depends_on_the_sizes_of_the_trace():
    model = scales.architectures.build("gpt2_untied")
    graph = lift(trace(model, scales.architectures.inputs(model), symbolic=True))
    after = compress_centered_stream.apply(centred(graph))
    inputs = scales.architectures.inputs(model, batch=3, length=11)
    one, two = (g.run(inputs, float64=True) for g in (graph, after))
    for name, value in one.items():
        assert (two[name] - value).abs().max() <= 1e-12 * value.abs().max()
