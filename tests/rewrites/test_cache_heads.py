"""Attention over a cache that it first widens: widened once, when a token comes, it computes the same."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from taut.graph import Graph, shape
from taut.lift import lift
from taut.ops.attention import attention
from taut.proof import SAME_FUNCTION
from taut.rewrite import STEP
from taut.rewrites.cache_heads import cache_heads
from taut.runtime.prepare import tidied
from taut.runtime.step import trace_step
from taut.shrink import tiny_model

aten = torch.ops.aten
LENGTH, STEPS = 12, 5
LATENT = [
    "DeepseekV3ForCausalLM",
    pytest.param("DiffLlamaForCausalLM", marks=pytest.mark.slow),  # one cache, read twice with other values
    pytest.param("DeepseekV2ForCausalLM", marks=pytest.mark.slow),  # neighbours turned
    pytest.param("MiniCPM3ForCausalLM", marks=pytest.mark.slow),
]


@functools.cache
def lifted(name: str) -> Graph:
    import transformers

    model = tiny_model(getattr(transformers, name))
    if hasattr(model.config, "_experts_implementation"):
        model.set_experts_implementation("eager")
    return lift(tidied(trace_step(model, LENGTH)))


def played(graph: Graph) -> Tensor:
    """The logits of some tokens in float64, from empty caches on."""
    placed = graph.placeholders("input")
    caches = {name: torch.zeros(shape(node)) for name, node in placed.items() if "." in name}
    names = {node.name: name for name, node in placed.items()}
    logits = []

    def keep(node, value, _):
        if node.target is aten.index_copy.default and node.args[0].name in names:
            caches[names[node.args[0].name]] = value
        return value

    for i in range(STEPS):
        inputs = {"token": torch.tensor([[3 + i]]), "position": torch.tensor([i])} | caches
        logits.append(graph.run(inputs, float64=True, watch=keep)["logits"])
    return torch.cat(logits)


@pytest.mark.parametrize("name", LATENT)
def test_widening_once_keeps_the_function(name: str):
    before = lifted(name)
    after = cache_heads.apply(before, form=STEP)
    true, new = played(before), played(after)
    assert float((new - true).abs().max() / true.abs().max()) <= SAME_FUNCTION
    for node in after.calls(attention):
        assert all(part.target is aten.index_copy.default for part in node.args[1:3])


def test_every_attention_of_latent_heads_is_a_site_and_no_cache_is_left_over():
    graph = lifted("DeepseekV3ForCausalLM")
    sites = cache_heads.find(graph, STEP)
    layers = sum(name.startswith("keys.") for name in graph.placeholders("input"))
    assert [site.refused for site in sites] == [None] * layers
    caches = cache_heads.apply(graph, form=STEP).placeholders("input")
    assert sorted(caches) == sorted(graph.placeholders("input"))
    heads, kept = shape(next(iter(graph.calls(attention))))[1], shape(caches["keys.0"])[1]
    assert heads == kept > 1


def test_what_mixes_cached_tokens_is_refused():
    graph = lifted("DeepseekV3ForCausalLM").copy()
    node = next(iter(graph.calls(attention)))
    node.update_arg(1, graph.insert(aten.flip.default, (node.args[1], [2]), node))
    assert "cached token alone" in (cache_heads.find(graph, STEP)[0].refused or "")


def test_a_plain_cache_is_left_as_it_is():
    assert not cache_heads.find(lifted("LlamaForCausalLM"), STEP)
