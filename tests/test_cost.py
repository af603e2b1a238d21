"""Costs counted from one small trace, against torch's own counter on the module run at the size asked for."""

from __future__ import annotations

import architectures
import pytest
import scales
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from taut.cost import DECODE, PREFILL, Cost, Workload, cost, decodes, least_time, workloads
from taut.machine import Figure, Machine
from taut.op import Work
from taut.rewrite import rewrites

MACHINE = Machine("m", "cpu", {"float32": Figure(100.0), "bfloat16": Figure(200.0)}, {"memory": Figure(10.0)})
SOME = scales.some(["llama", "gemma2", "gpt2", "cohere", "mixtral", "deepseek_v3", "gpt_neox", "olmo2"])


def counted(name: str, workload: Workload, dtype: torch.dtype | None = None) -> Cost:
    return cost(scales.traced(name)[1], workload, dtype, decodes(architectures.build(name)))


def products(found: Cost) -> float:
    kinds = ("linear", "expert_linear", "conv2d", "matmul", "einsum")
    return sum(item.work.flops for item in found.items if item.kind in kinds)


@pytest.mark.parametrize("name", SOME)
def test_products_are_those_that_torch_counts_at_that_size(name: str):
    """The trace has batch 2 and 13 tokens; the module is run on 3 times 29."""
    model = architectures.build(name)
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        config._attn_implementation = "eager"
        config._experts_implementation = "eager"
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(3, 90, (3, 29)), use_cache=False)
    theirs = sum(counter.get_flop_counts()["Global"].values())
    found = counted(name, Workload("some", batch=3, length=29))
    attention = [item for item in found.items if item.kind == "attention"]
    assert products(found) + 2 * sum(item.work.flops for item in attention) == pytest.approx(theirs, rel=0.05)
    assert products(found) < theirs


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_decode_step_reads_every_weight_and_the_cache_once(name: str):
    model = architectures.build(name)
    config = model.config
    weights = sum(p.numel() for p in model.parameters()) * 2
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    tied = {p.data_ptr() for p in model.lm_head.parameters()}
    unread = sum(t.numel() - t.shape[1] for t in tables if t.data_ptr() not in tied) * 2
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    cache = 2 * 2 * config.num_hidden_layers * heads * config.hidden_size // config.num_attention_heads * DECODE.context
    found = counted(name, DECODE, torch.bfloat16)
    assert sum(item.held for item in found.items) == pytest.approx(weights - unread + cache, rel=0.02)
    assert found.fused.bytes < found.work.bytes


def test_what_grows_with_what():
    """Weights are read once whatever the batch; attention grows with the square of the length."""
    one, long = (counted("llama", Workload("w", length=n)) for n in (256, 512))
    four = counted("llama", Workload("w", batch=4, length=256))
    parts = lambda found, kind: sum(item.work.flops for item in found.items if item.kind == kind)  # noqa: E731
    assert parts(long, "linear") == 2 * parts(one, "linear")
    assert parts(four, "linear") == 4 * parts(one, "linear")
    assert parts(long, "attention") == pytest.approx(4 * parts(one, "attention"), rel=0.01)
    assert parts(four, "attention") == 4 * parts(one, "attention")
    held = lambda found: sum(item.held for item in found.items if item.kind == "linear")  # noqa: E731
    assert held(four) == held(one)


def test_a_decode_step_reads_only_the_experts_chosen():
    weight = architectures.build("mixtral").model.layers[0].mlp.experts.down_proj
    one, many = (counted("mixtral", Workload("w", length=n)) for n in (1, 64))
    held = lambda found: next(item.held for item in reversed(found.items) if item.kind == "expert_linear")  # noqa: E731
    assert held(one) == pytest.approx(weight.nbytes * 2 / 4, rel=0.01)
    assert held(many) == pytest.approx(weight.nbytes, rel=0.01)


def test_views_and_what_can_be_computed_ahead_are_free():
    kinds = {item.kind for item in counted("llama", PREFILL).items}
    assert not kinds & {"reshape", "transpose", "unsqueeze", "getitem", "cos", "sin", "arange", "to"}


def test_every_architecture_is_counted():
    for name in ("bert", "vit", "t5", "mamba"):
        graph, model = scales.traced(name)[1], architectures.build(name)
        for workload in workloads(graph, decodes(model)):
            found = cost(graph, workload, torch.bfloat16, decodes(model))
            assert 0 < found.floor(MACHINE) <= found.one_by_one(MACHINE)
    assert [w.name for w in workloads(scales.traced("bert")[1], False)] == ["forward"]


def test_shares_add_up_and_floors_are_ordered():
    found = counted("llama", DECODE)
    kinds = found.kinds(MACHINE)
    assert sum(kind.share for kind in kinds) == pytest.approx(1)
    assert sum(kind.calls for kind in kinds) == len(found.items)
    assert [kind.seconds for kind in kinds] == sorted((kind.seconds for kind in kinds), reverse=True)
    assert found.floor(MACHINE) < found.one_by_one(MACHINE)


def test_folding_and_merging_save_what_they_leave_out():
    graph = scales.traced("llama")[1]
    known = rewrites()
    folded = known["fold_norm"].apply(graph)
    merged = known["merge_linears"].apply(folded)
    before, after, last = (cost(g, PREFILL) for g in (graph, folded, merged))
    gains = 4 * 48 * 4
    assert before.work.bytes - after.work.bytes == gains
    queries = 2 * (2 + 1) * 512 * 48 * 4  # two of q, k, v and one of gate, up no longer read x, in two layers
    assert after.work.bytes - last.work.bytes == queries
    assert len(last.items) < len(after.items)


def test_einsum_and_products_of_activations():
    def body(m, x):
        scores = torch.einsum("bld,bkd->blk", m.q(x), m.k(x))
        return scores.softmax(-1) @ m.v(x)

    layers = {name: nn.Linear(16, 16, bias=False) for name in "qkv"}
    raw, _, _ = scales.hand_made(body, **layers)
    found = cost(raw, Workload("w"))
    by_kind = {kind.kind: kind.work.flops for kind in found.kinds(MACHINE)}
    assert by_kind["einsum"] == by_kind["matmul"] == 2 * 6 * 6 * 16


def test_least_time_is_the_roofline_and_widens_where_it_must():
    assert least_time(MACHINE, Work(1000, 10), "bfloat16") == 5
    assert least_time(MACHINE, Work(1000, 10), "float16") == 10
    assert least_time(MACHINE, Work(10, 100), "float32") == 10
