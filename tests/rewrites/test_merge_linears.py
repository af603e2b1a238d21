"""merge_linears: hand-counted groups, proof, the checkpoint's names, and every reason to refuse."""

import pytest
import torch
import torch.nn.functional as F
from scales import L, hand_made, some, traced

from taut.ops.linear import linear
from taut.proof import prove
from taut.rewrite import STOCK
from taut.rewrites.center_norm_input import center_norm_input
from taut.rewrites.fold_norm import fold_norm
from taut.rewrites.merge_linears import merge_linears
from taut.values import Original, Stacked

# Counted by hand from the modeling code, two layers each: groups of siblings, and the linear layers in them.
GROUPS = {
    "llama": (4, 10),
    "qwen2": (4, 10),  # q, k and v with biases
    "gemma2": (4, 10),
    "olmo2": (4, 10),
    "mixtral": (2, 6),  # experts are one tensor each already
    "deepseek_v3": (4, 8),  # the first down-projections of q and kv, the dense and the shared gate and up
    "gpt_neox": (0, 0),
    "gpt2": (0, 0),
    "bert": (2, 6),
    "t5": (5, 16),  # both decoder layers' k and v of the encoder's output are one group
    "vit": (2, 6),
    "cohere": (2, 10),  # attention and feed-forward read one norm
    "mamba": (0, 0),
}


@pytest.mark.parametrize("name", some(GROUPS))
def test_groups_are_those_counted_by_hand_and_the_proof_passes(name):
    raw, lifted, inputs = traced(name)
    sites = merge_linears.find(lifted)
    assert all(site.refused is None for site in sites)
    merged = merge_linears.apply(lifted)
    fewer = len(list(lifted.calls(linear))) - len(list(merged.calls(linear)))
    assert (len(sites), fewer + len(sites)) == GROUPS[name]
    evidence = prove(raw, merged, [inputs])
    assert evidence.passed, evidence
    assert merge_linears.find(merged) == []


def test_the_new_parameter_replaces_the_old_ones():
    _, lifted, _ = traced("qwen2")
    merged = merge_linears.apply(lifted, ["model.layers.0.self_attn.q_proj+k_proj+v_proj"])
    names = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    new = "model.layers.0.self_attn.q_proj_k_proj_v_proj"
    for kind in ("weight", "bias"):
        heights = tuple(len(lifted.tensors[f"{name}.{kind}"]) for name in names)
        assert merged.values[f"{new}.{kind}"] == Stacked(tuple(Original(f"{name}.{kind}") for name in names), heights)
        assert not {f"{name}.{kind}" for name in names} & set(merged.values)
        parts = [lifted.tensors[f"{name}.{kind}"] for name in names]
        assert torch.equal(merged.evaluate(f"{new}.{kind}", None), torch.cat(parts))
    assert set(merged.placeholders("parameter")) == set(merged.values)
    assert set(merged.changed()) == {f"{new}.weight", f"{new}.bias"}


def test_stock_form_keeps_the_layers():
    assert merge_linears.find(traced("llama")[1], STOCK) == []


def test_it_merges_what_was_folded_and_centred():
    raw, graph, inputs = traced("vit")
    for rewrite in (fold_norm, center_norm_input, merge_linears):
        graph = rewrite.apply(graph)
    assert len([value for value in graph.values.values() if isinstance(value, Stacked)]) == 4
    evidence = prove(raw, graph, [inputs])
    assert evidence.passed, evidence


def sites(body, **layers):
    raw, graph, inputs = hand_made(body, **layers)
    found = merge_linears.find(graph)
    evidence = prove(raw, merge_linears.apply(graph), [inputs])
    assert evidence.passed, evidence
    return [(site.where, site.refused) for site in found]


def test_siblings_of_any_width_with_whatever_reads_them():
    found = sites(lambda m, x: (m.a(x), m.c(x).relu() + m.b(x)[..., :5]), a=L(16, 3), b=L(16, 7), c=L(16, 5))
    assert found == [("a+c+b", None)]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda m, x: m.a(x) + m.bare(x), "some of them have a bias and others have none"),
        (lambda m, x: m.a(x) + m.a(x) * m.b(x), "a.weight is also read by linear in a"),
        (lambda m, x: m.a(x) * m.b(x) + m.b(F.relu(x)), "b.weight is also read by linear in b"),
        (lambda m, x: m.a(x) + F.linear(x, m.b.weight.mT, m.b.bias), "does not read its parameters as they are stored"),
    ],
)
def test_every_reason_to_refuse(body, reason):
    ((_, refused),) = sites(body, a=L(16, 16), b=L(16, 16), bare=L(16, 16, bias=False))
    assert refused is not None
    assert reason in refused


def test_different_dtypes_are_refused():
    _, graph, _ = hand_made(lambda m, x: m.a(x) + m.b(x), a=L(16, 4), b=L(16, 4))
    graph.tensors = dict(graph.tensors) | {"b.weight": graph.tensors["b.weight"].bfloat16()}
    (site,) = merge_linears.find(graph)
    assert site.refused == "their parameters have different dtypes"


def test_layers_on_different_values_are_no_siblings():
    assert sites(lambda m, x: m.a(x) + m.b(F.relu(x)), a=L(16, 4), b=L(16, 4)) == []
